"""Two programs have the same order where nothing that a launch could tell apart orders their accesses."""

import pytest
from test_ptxsim_findings import COPY, EXCHANGE, PRODUCT, execute

from fastlm.testing.ptxsim import SimulationError
from fastlm.testing.ptxsim.order import Order, reduced

TWO_COPIES = """
cp.async.ca.shared.global [%r3], [%rd4], 4;
cp.async.commit_group;
cp.async.ca.shared.global [%r3+256], [%rd4], 4;
cp.async.commit_group;
cp.async.wait_group 0;
bar.sync 0;
ld.shared.b32 %r6, [%r4];
ld.shared.b32 %r7, [%r4+256];
add.s32 %r6, %r6, %r7;
st.global.b32 [%rd5], %r6;
"""
UNREAD = "bar.sync 0; cp.async.ca.shared.global [%r3], [%rd4], 4; cp.async.commit_group;"
WAIT, STORE = "cp.async.wait_group 0;", "st.global.b32 [%rd5], %r6;"
OTHER = "st.shared.b32 [%r3+256], %r6; ld.shared.b32 %r6, [%r3+256];" + STORE
OWN = """
ld.global.b32 %r5, [%rd4];
st.shared.b32 [%r3], %r5;
bar.sync 0;
ld.shared.b32 %r6, [%r3];
st.global.b32 [%rd5], %r6;
"""


def order_of(body, threads=64):
    order = Order()
    execute(body, threads, shared=512, order=order)
    return order.digest()


def without(body, statement, number=0):
    """The body without the statement's number-th place."""
    parts = body.split(statement)
    return statement.join(parts[: number + 1]) + "\n" + statement.join(parts[number + 1 :])


@pytest.mark.parametrize(
    "body, changed",
    [
        (TWO_COPIES, without(TWO_COPIES, "cp.async.commit_group;")),
        (COPY, COPY.replace("wait_group 0;", "wait_group 0; cp.async.wait_group 0;")),
        (COPY, COPY.replace("wait_group 0;", "wait_all;")),
        (COPY, COPY.replace("bar.sync 0;", "bar.sync 0; cp.async.wait_group 0; bar.sync 0;")),
        (EXCHANGE, EXCHANGE.replace("bar.sync 0;", "bar.sync 0; bar.sync 0;")),
        (EXCHANGE, EXCHANGE.replace("bar.sync 0;", "bar.warp.sync 0xffffffff; bar.sync 0;")),
        (EXCHANGE, EXCHANGE.replace("bar.sync 0;", "bar.sync 0; bar.warp.sync 0xffffffff;")),
        (EXCHANGE, "bar.sync 0;" + EXCHANGE + "bar.sync 0;"),
        (EXCHANGE, EXCHANGE.replace("st.shared", "bar.sync 0; st.shared")),
        (COPY + UNREAD + WAIT + STORE + WAIT, COPY + UNREAD + STORE + WAIT),
        (COPY + UNREAD + WAIT + OTHER + WAIT, COPY + UNREAD + OTHER + WAIT),
    ],
    ids=[
        "commit",
        "wait",
        "all",
        "barrier",
        "twice",
        "warp first",
        "warp behind",
        "ends",
        "apart",
        "unread",
        "other",
    ],
)
def test_what_has_no_effect_leaves_the_order(body, changed):
    assert body != changed and order_of(body) == order_of(changed)


@pytest.mark.parametrize(
    "body, changed",
    [
        (TWO_COPIES, without(TWO_COPIES, "cp.async.commit_group;", 1)),
        (TWO_COPIES, TWO_COPIES.replace("wait_group 0", "wait_group 1")),
        (COPY, without(COPY, "cp.async.wait_group 0;")),
        (COPY, without(COPY, "bar.sync 0;")),
        (COPY, without(COPY, "bar.sync 0;").replace("cp.async.wait", "bar.sync 0; cp.async.wait")),
    ],
    ids=["last commit", "weaker", "no wait", "no barrier", "barrier before the wait"],
)
def test_what_breaks_a_kernel_is_never_the_same(body, changed):
    order = Order()
    with pytest.raises(SimulationError):
        execute(changed, shared=512, order=order)
    assert order.digest() != order_of(body)


@pytest.mark.parametrize("instead", ["", "bar.warp.sync 0xffffffff;"])
def test_a_barrier_that_nobody_needs_is_still_told(instead):
    changed = OWN.replace("bar.sync 0;", instead)
    assert execute(changed).tolist() == list(range(64))
    assert order_of(changed) != order_of(OWN)


FENCE, PROXY = "wgmma.fence.sync.aligned;", "fence.proxy.async.shared::cta;"
DONE = "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(
    "statement, instead, alike",
    [
        (FENCE, FENCE + FENCE, True),
        (PROXY, PROXY + PROXY, True),
        (DONE, DONE + DONE, True),
        ("wgmma.commit_group.sync.aligned;", "wgmma.commit_group.sync.aligned;" * 2, True),
        (FENCE, FENCE + "mov.u32 %r6, %d1;" + FENCE, False),
        (PROXY + " bar.sync 0;", "bar.sync 0;" + PROXY, False),
        (DONE, "mov.u32 %r6, %a0;" + DONE, True),
    ],
)
def test_of_wgmmas_fences_and_waits_those_that_order_something_are_told(statement, instead, alike):
    body = "and.b32 %r1, %r1, 63; " + PRODUCT.replace("shared::cta;\nbar", "shared::cta; bar")
    changed = body.replace(statement, instead)
    assert body != changed and (order_of(body, 128) == order_of(changed, 128)) == alike


def test_a_wait_at_another_access_is_told():
    early = TWO_COPIES.replace(
        "cp.async.ca.shared.global [%r3+256]", "cp.async.wait_group 0; cp.async.ca.shared.global [%r3+256]"
    )
    assert order_of(early) != order_of(TWO_COPIES)


@pytest.mark.parametrize(
    "window, left",
    [
        ("fence barrier fence barrier", "fence barrier"),
        ("fence done fence", "done fence"),
        ("fence barrier fence", "fence barrier fence"),
        ("done barrier done", "done barrier done"),
        ("done fence", "done fence"),
        ("fence done", "fence done"),
        ("warps done warps", "done warps"),
        ("barrier done warps", "barrier done warps"),
    ],
)
def test_a_window_keeps_what_no_later_event_repeats(window, left):
    assert [e[0] for e in reduced([(kind, "a") for kind in window.split()])] == left.split()


def test_barriers_of_other_blocks_are_all_kept():
    window = [("barrier", "a"), ("barrier", "b"), ("done", "y"), ("done", "x"), ("warps", "b", "w")]
    assert reduced(window) == [*window[:2], ("done", "x"), ("done", "y"), window[4]]
