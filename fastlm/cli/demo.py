"""fastlm demo: swap fastlm into a plain language model, prove it computes the same, train both, compare."""

import copy
import platform
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastlm

from .. import _load
from . import demo_files, demo_memory, demo_text, demo_train
from .demo_model import Size, make_model
from .errors import CommandError

SEED = 1
SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class Options:
    """What the command line asks for. text: a UTF-8 file, or None for Python's own help topics."""

    text: Path | None = None
    steps: int = 50
    device: str = "cpu"
    out: Path = Path("demo_out")
    size: Size = Size()


def run(options: Options, console: Console) -> dict:
    """Does the whole job, prints it, writes its three files, and returns report.json's content.

    Raises: CommandError where it cannot go on (then nothing is written), and where the losses moved apart.
    """
    device = _checked(options)
    with demo_files.staged(options.out) as folder:
        report = _measure(options, device, console)
        demo_files.write_results(folder, report)
    _say(console, f"\nWrote report.json, loss.png and throughput.png to {options.out}/")
    if not report["curves"]["together"]:
        raise CommandError(f"the two models did not train alike: see {options.out}/loss.png")
    return report


def _checked(options: Options) -> torch.device:
    missing = [name for name in ("tokenizers", "matplotlib") if find_spec(name) is None]
    if missing:
        raise CommandError(f"needs {' and '.join(missing)}: pip install 'fastlm[train]'")
    if options.steps < 1:
        raise CommandError(f"--steps must be at least 1, got {options.steps}")
    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {options.device} cannot be used: {reason}") from error
    return device


def _measure(options: Options, device: torch.device, console: Console) -> dict:
    text = demo_text.read_text(options.text)
    tokenizer = demo_text.train_tokenizer(text, options.size.vocab)
    size = replace(options.size, vocab=tokenizer.get_vocab_size())
    tokens = demo_text.encode(tokenizer, text, shortest=2 * size.context)
    torch.manual_seed(SEED)
    original = make_model(size, device)
    report = _facts(options, device, size, text, tokens, original)
    _print_facts(console, report)

    patched = copy.deepcopy(original)
    swaps = fastlm.patch(patched)
    _say(console, f"\n{swaps}\n")
    pairs = demo_text.batches(tokens, options.steps + 1, size.batch, size.context, SEED)
    pairs = ((x.to(device), y.to(device)) for x, y in pairs)
    first = next(pairs)
    report["parity"] = _proved(original, patched, first, console)
    backends = demo_train.backends_of_a_step(patched, *first)
    runs = _trained({"baseline": original, "fastlm": patched}, pairs, options.steps, console)
    for side, trained in runs.items():
        report[side] = {
            "tokens_per_s": trained.tokens_per_s(size.batch * size.context),
            "peak_mb": demo_memory.peak_mb(side, size, device),
            "losses": trained.losses,
        }
    report["fastlm"] |= {"version": fastlm.__version__, "backends": backends, "patch": swaps.to_dict()}
    report["speedup"] = report["fastlm"]["tokens_per_s"] / report["baseline"]["tokens_per_s"]
    report["curves"] = demo_train.curves(runs["baseline"].losses, runs["fastlm"].losses)
    report["sample"] = _sample(patched, tokenizer, tokens, device)
    _print_results(console, report)
    return report


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _facts(options: Options, device: torch.device, size: Size, text: str, tokens, model) -> dict:
    return {
        "device": str(device),
        "machine": platform.machine(),
        "instruction_set": _load.ISA,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": options.steps,
        "text": {
            "source": "pydoc_data.topics" if options.text is None else str(options.text),
            "characters": len(text),
            "tokens": len(tokens),
        },
        "model": asdict(size) | {"parameters": sum(p.numel() for p in model.parameters())},
        "tokens_per_step": size.batch * size.context,
        "peak_mb_is": demo_memory.MEASURED_CUDA if device.type == "cuda" else demo_memory.MEASURED,
    }


def _print_facts(console: Console, report: dict) -> None:
    text, model = report["text"], report["model"]
    _say(
        console,
        f"Text: {text['source']}, {text['characters']:,} characters, {text['tokens']:,} tokens"
        f" of a vocabulary of {model['vocab']:,}\n"
        f"Model: examples/plain_gpt.py, {model['parameters'] / 1e6:.1f} million parameters, {model['layers']}"
        f" layers of {model['dim']}; {model['batch']} x {model['context']} tokens a step\n"
        f"Machine: {report['device']}, {report['instruction_set']}, {report['threads']} threads,"
        f" torch {report['torch']}",
    )


def _proved(original, patched, pair, console: Console) -> dict:
    found = demo_train.parity(original, patched, *pair)
    worst = max(found, key=lambda v: v.ratio)
    passed = worst.ratio <= 1
    _say(
        console,
        f"Parity with float64, {len(found)} tensors (logits, loss, gradients):"
        f" {'passed' if passed else 'FAILED'}; the worst error is {worst.ratio:.2f} of what"
        f" the 2x rule allows ({worst.name})",
    )
    if not passed:
        raise CommandError(f"the patched model does not compute the same: {worst}")
    return {"max_error_ratio": worst.ratio, "passed": passed, "worst": worst.name, "tensors": len(found)}


def _trained(models: dict, pairs, steps: int, console: Console) -> dict[str, demo_train.Run]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("Training both, batch by batch in turn", total=steps)
        return demo_train.train_in_turn(models, pairs, lambda: progress.advance(task))


def _sample(model, tokenizer, tokens, device: torch.device) -> str:
    model.eval()
    prompt = tokens[:8].to(device).unsqueeze(0)
    return tokenizer.decode(model.generate(prompt, SAMPLE_TOKENS)[0].tolist()).strip()


def _print_results(console: Console, report: dict) -> None:
    baseline, ours, curves = report["baseline"], report["fastlm"], report["curves"]
    table = Table("", "torch.nn", "fastlm", "ratio")
    for label, key in (("training tokens/s", "tokens_per_s"), ("peak memory, MB", "peak_mb")):
        table.add_row(label, f"{baseline[key]:,.0f}", f"{ours[key]:,.0f}", f"{ours[key] / baseline[key]:.2f}")
    for label, i in (("loss at the first step", 0), ("loss at the last step", -1)):
        table.add_row(label, *(f"{side['losses'][i]:.2f}" for side in (baseline, ours)), "")
    console.print(table)
    _say(console, f"Peak memory: {report['peak_mb_is']}.")
    fell = {True: "Both losses fell", False: "NOT both losses fell", None: "Too few steps to see a loss fall"}
    _say(
        console,
        f"{fell[curves['fell']]}; they {'stay' if curves['together'] else 'do NOT stay'} together"
        f" (mean distance {curves['mean_relative_distance']:.1%})",
    )
    ran = ", ".join(f"{op} on {backend}" for op, backend in ours["backends"].items())
    _say(console, f"Ops of one step: {ran or 'none'}")
    _say(console, f"\nWritten by the patched model:\n{report['sample']}")
