"""The mutation tool tells what the cases catch from what they do not, by planted changes of both sorts."""

import json

import pytest
import torch

from fastlm.testing.cases import cases_of
from fastlm.testing.mutate import explained_cuda, ptx, source
from fastlm.testing.mutate.explained import REASONS, Reason, reason_for
from fastlm.testing.mutate.job import CAUGHT, SURVIVED, Job, groups_of
from fastlm.testing.mutate.points import SAME, Point
from fastlm.testing.mutate.report import markdown, report
from fastlm.testing.mutate.state import State


@pytest.fixture(scope="module")
def point():
    case = next(c for c in cases_of("layer_norm")[0] if c.name == "odd")
    made = Point("layer_norm", case, torch.float32, "sm_80")
    assert made.baseline() is None
    return made


def forward_group(point):
    paths = source.TritonKernels("layer_norm", "sm_80").paths()
    return next(g for g in groups_of([point], paths) if g.kernel == "norm_forward")


def test_every_change_of_the_forward_kernels_barriers_is_caught(point):
    group = forward_group(point)
    found = [(at, change) for at, site in group.sites.items() for change in ptx.changes(site)]
    assert len(found) >= 4
    assert all("race" in point.wrong(group.rewrite(*change)) for change in found)


def test_a_barrier_that_stands_twice_is_not_missed(point):
    launch = next(la for la in point.launches if la.kernel == "norm_forward")
    twice = launch.binary.decode().replace("bar.sync \t0;", "bar.sync \t0; bar.sync \t0;")
    sites = ptx.sites(twice)
    assert len(sites) == 2 * len(ptx.sites(launch.binary.decode()))
    for site in sites[:2]:
        new = ptx.changed(twice, site, ptx.changes(site)[0]).encode()
        assert point.wrong(lambda _, text, new=new: new if text == launch.binary else text) is None


def test_a_site_is_told_by_the_line_of_the_kernels_source(point):
    group = forward_group(point)
    lines = [group.line(site.source) for site in group.sites.values()]
    assert lines and all("tl.sum" in line or "tl.store" in line for line in lines)


def test_masks_are_changed_one_at_a_time_and_what_is_no_change_is_told_apart(point, tmp_path):
    function = next(f for f in source.functions() if f.__name__ == "norm_forward")
    job = Job("layer_norm", "sm_80", State(tmp_path / "state.json"), str)
    found = {c.what: c for c in source.changes(function)}

    def verdict(text):
        with source.replaced(function, text):
            return job._verdict([point], source.Changed().wrong)[0]

    assert verdict(found["row < rows -> row <= rows"].text) == CAUGHT
    assert verdict(function.src.replace("col < cols", "cols > col")) in (SAME, SURVIVED)
    assert verdict(function.src.replace("tl.sum(n, 1)", "tl.sum(n * 2.0, 1)")) == CAUGHT
    assert point.wrong() is None  # all is as before


def test_what_has_been_tried_is_not_tried_again(point, tmp_path):
    state = State(tmp_path / "state.json")
    job = Job("layer_norm", "sm_80", state, str)
    group = forward_group(point)
    job._group(group)
    state.write()
    tried = State(tmp_path / "state.json")
    assert tried.records == state.records
    again = Job("layer_norm", "sm_80", tried, lambda text: pytest.fail(f"tried again: {text}"))
    again._group(group)


def test_survivors_need_a_reason(monkeypatch):
    record = {"op": "o", "arch": "sm_80", "kind": "ptx", "kernel": "k", "where": "f.py:1", "line": "x = 1"}
    record |= {"what": "bar.sync 0 deleted", "verdict": SURVIVED, "seconds": 1.0}
    monkeypatch.setattr("fastlm.testing.mutate.explained.REASONS", [])
    assert report([record])["rows"][0]["unexplained"] == 1
    assert "NOT EXPLAINED" in markdown(report([record]))
    told = [Reason("k", "x = ", "bar.sync", "the last one protects nothing")]
    monkeypatch.setattr("fastlm.testing.mutate.explained.REASONS", told)
    assert reason_for(record) == "the last one protects nothing"
    assert json.loads(json.dumps(report([record])))["rows"][0]["unexplained"] == 0


def test_reasons_are_sentences():
    every = REASONS + explained_cuda.REASONS
    assert all(len(r.reason.split()) > 4 and r.reason.endswith(".") for r in every)


def test_a_change_of_the_source_that_ops_share_is_tried_and_counted_once(tmp_path):
    facts = {"kind": "source", "kernel": "k", "where": "f.py:1", "line": "x", "what": "a < b -> a <= b"}
    one = facts | {"op": "one", "arch": "sm_80", "verdict": SURVIVED, "seconds": 1.0}
    two, three = one | {"op": "two", "verdict": CAUGHT}, one | {"op": "three", "verdict": CAUGHT}
    another = one | {"what": "another"}  # survives both ops' cases
    found = report([one, two, three, two | {"kind": "ptx"}, another, another | {"op": "two"}])
    assert {(r["op"], r["kind"]): (r["mutants"], r["caught"]) for r in found["rows"]} == {
        ("one", "source"): (1, 0),
        ("two", "ptx"): (1, 1),
        ("two", "source"): (1, 1),
    }
    state = State(tmp_path / "state.json")
    job = Job("one", "sm_80", state, str)
    assert not job._caught_elsewhere(facts)
    state.add("key", two)
    assert job._caught_elsewhere(facts) and not job._caught_elsewhere(facts | {"kind": "ptx"})
