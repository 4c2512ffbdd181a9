"""What TRL's DPOTrainer and accelerate do when something goes wrong, measured: a tiny random GPT-2 on the CPU.

`python tests/faults/peers.py [--out FILE]` prints a Markdown table and writes the same rows as JSON. Every run is a
process of its own, so that it can be killed and so that none sees another's random state. Where a resumed run is
called bit-equal, its losses and the sha256 of its final weights were compared with those of the run beside it.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads must not be forked

import argparse
import atexit
import contextlib
import gc
import json
import logging
import math
import multiprocessing
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import ProjectConfiguration, find_executable_batch_size, set_seed
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from trl import DPOConfig, DPOTrainer

from dpo_helpers.models import weights_hash
from dpo_helpers.run.loading import load_tokenizer
from dpo_helpers.settings import load_settings

ROWS, BATCH, STEPS, AN_EPOCH, POSITIONS, BAD = 24, 4, 12, 6, 64, 7
KILLED_BEFORE = (2, 4, 6, 7, 9, 11)  # these steps, counted from 0; 6 is the first of the second epoch
DAMAGED, FLIPS, LIMIT_S = 9, 30, 60
FORK = multiprocessing.get_context("fork")  # a fresh interpreter would import torch and TRL for seconds each time
WORK = Path(tempfile.mkdtemp(prefix="peers-"))
atexit.register(shutil.rmtree, WORK, ignore_errors=True)  # not in the forks: they leave without it
START = WORK / "start"


@dataclass
class Ran:
    """How a task in a process of its own ended: with a value, with an exception, or killed by a signal."""

    value: Any = None
    error: str = ""
    message: str = ""
    signal: int = 0
    warnings: list[str] = field(default_factory=list)

    def names(self, file: str, folder: str) -> str:
        """What the message names: the file, or at least the folder that it is in."""
        return f"names {'the file' if file in self.message else 'the folder only' if folder in self.message else 'neither'}"

    def failure(self) -> str:
        """The exception and the first line of its message, without this machine's folders; '' if there was none."""
        lines = self.message.replace(str(WORK) + os.sep, "").strip().splitlines() or [""]
        line = re.sub(r"(?<![\w.<])/(?:[^\s/']+/)+", "", lines[0])[:200]
        return f"{self.error}: {line}" if self.error else f"signal {self.signal}" if self.signal else ""


def _child(sender: Any, task: Callable[[], Any]) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    heard: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.captureWarnings(True)
    for name in ("transformers", "trl", "accelerate", "datasets", "py.warnings"):
        logging.getLogger(name).addHandler(listener)
    try:
        ran = Ran(task())
    except Exception as error:
        ran = Ran(error=type(error).__name__, message=str(error))
    ran.warnings = heard
    sender.send(ran)
    os._exit(0)  # torch takes longer to tear down than a run here takes


def in_child(task: Callable[..., Any], *arguments: Any, **options: Any) -> Ran:
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_child, args=(sender, partial(task, *arguments, **options)))
    process.start()
    sender.close()
    ran = None
    with contextlib.suppress(EOFError):  # it died before it could send
        late = Ran(error="TimeoutError", message=f"no end within {LIMIT_S} s")
        ran = receiver.recv() if receiver.poll(LIMIT_S) else late
    process.join(5)
    if process.is_alive():
        process.kill()
        process.join()
    return ran or Ran(signal=-(process.exitcode or 0))


def prepare() -> None:
    """The weights that every run starts from, larger than GPT-2's initial ones, whose logits are almost equal."""
    torch.manual_seed(0)
    vocabulary = len(load_tokenizer(load_settings("mini")))
    sizes = {"n_positions": POSITIONS, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    model.save_pretrained(START)
    GPT2LMHeadModel.from_pretrained(START)  # what it compiles and caches, all forks then have
    gc.freeze()  # else the first collection in each fork goes through, and copies, all that was imported


def good_rows(count: int = ROWS) -> list[dict[str, Any]]:
    fruits = ["apples", "pears", "plums", "figs", "dates", "limes"]
    rows = []
    for i in range(count):
        fruit = fruits[i % len(fruits)]
        prompt = f"Human: What do you think of {i + 2} {fruit}?\n\nAssistant:"
        rows.append({"prompt": prompt, "chosen": f" I like {fruit} a lot.", "rejected": f" No {fruit}, please!" * 2})
    return rows


class Recorder(DPOTrainer):
    """TRL's trainer that notes (step, pairs, loss), and that a test can kill or run out of memory."""

    kill_before: int | None = None
    memory_ends_before, memory_for = -1, 0

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step, pairs = self.state.global_step, len(inputs["input_ids"]) // 2
        if step == self.kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.memory_ends_before and pairs > self.memory_for:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.__dict__.setdefault("seen", []).append((step, pairs, loss.item()))
        return loss


def trl_trainer(folder: Path, rows: Any, model: Any, ref_model: Any = None, **options: Any) -> Recorder:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": BATCH, "num_train_epochs": STEPS // AN_EPOCH,
        "learning_rate": 1e-3, "save_steps": 1, "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False,
        "disable_tqdm": True, "gradient_checkpointing": False, "disable_dropout": False, "max_length": POSITIONS,
        "beta": 0.1, "seed": 1, **options,
    }  # fmt: skip
    tokenizer = load_tokenizer(load_settings("mini"))
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return Recorder(model, ref_model, DPOConfig(**settings), train_dataset=data, processing_class=tokenizer)


def trl_run(
    folder: Path, resume: bool | Path = False, kill_before: int | None = None, start: Path = START,
    rows: list[dict[str, Any]] | None = None, change: Callable[[Any], None] | None = None,
    reference: Callable[[Any], Any] | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train; `change` alters the policy in memory, `reference` makes the reference from it (else TRL makes one)."""
    model = GPT2LMHeadModel.from_pretrained(start)
    if change:
        change(model)
    trainer = trl_trainer(folder, rows or good_rows(), model, reference(model) if reference else None, **options)
    trainer.kill_before = kill_before
    before = weights_hash(trainer.ref_model)
    trainer.train(resume_from_checkpoint=resume if isinstance(resume, bool) else str(resume))
    return {
        "losses": trainer.seen,
        "weights": weights_hash(model),
        "logged": [entry for entry in trainer.state.log_history if "loss" in entry],
        "nan": any(parameter.isnan().any().item() for parameter in model.parameters()),
        "reference": weights_hash(trainer.ref_model),
        "reference kept": before == weights_hash(trainer.ref_model),
    }


def accelerate_run(
    folder: Path, resume: bool | Path = False, kill_before: int | None = None, seedable: bool = True,
    generator: bool = False, dropout: float = 0.1, reverse: bool = False, decay: int = STEPS,
) -> dict[str, Any]:  # fmt: skip
    """A plain training loop as accelerate's guide to checkpoints has it, one save_state after every step."""
    set_seed(1)
    project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=resume is True)
    loading = DataLoaderConfiguration(use_seedable_sampler=seedable)
    accelerator = Accelerator(cpu=True, dataloader_config=loading, project_config=project)
    model = GPT2LMHeadModel.from_pretrained(START, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, decay)
    tokens = torch.randint(1, 1000, (ROWS, 12), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [torch.tensor(row) for row in (reversed(tokens) if reverse else tokens)]
    own = torch.Generator().manual_seed(4) if generator else None
    loader = DataLoader(rows, batch_size=BATCH, shuffle=True, generator=own)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    done, losses = 0, []
    if resume:
        accelerator.load_state(None if resume is True else str(resume))
        done = step_of(newest(folder) if resume is True else resume)
    for step, batch in batches(accelerator, loader, done):
        if step == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append((step, len(batch), loss.item()))
        if not resume:
            accelerator.save_state(str(folder / "checkpoints" / f"checkpoint_{step + 1}"))
    return {"losses": losses, "weights": weights_hash(model)}


def batches(accelerator: Accelerator, loader: Any, done: int) -> Iterator[tuple[int, torch.Tensor]]:
    step = done
    for epoch in range(done // AN_EPOCH, STEPS // AN_EPOCH):
        loader.set_epoch(epoch)
        skip = step - epoch * AN_EPOCH
        for batch in accelerator.skip_first_batches(loader, skip) if skip else loader:
            yield step, batch
            step += 1


def step_of(checkpoint: Path) -> int:
    return int(re.split("[-_]", checkpoint.name)[-1])


def checkpoints(folder: Path) -> dict[int, Path]:
    return {step_of(path): path for path in sorted(folder.glob("**/checkpoint[-_]*")) if path.is_dir()}


def newest(folder: Path) -> Path:
    found = checkpoints(folder)
    return found[max(found)]


PEERS: dict[str, Callable[..., dict[str, Any]]] = {"TRL": trl_run, "accelerate": accelerate_run}
Row = tuple[str, str, str, str]  # what was tried, the peer, the outcome, details
_finished: dict[str, tuple[Path, Ran]] = {}


def finished(peer: str) -> tuple[Path, Ran]:
    """The folder of an undisturbed run, with a checkpoint of each step, and that run resumed at step DAMAGED.

    That resumed run, not the uninterrupted one, is what damage is measured against: accelerate's two differ.
    """
    if peer not in _finished:
        folder = WORK / f"finished-{peer}"
        in_child(PEERS[peer], folder)
        copy = WORK / f"clean-{peer}"
        clean = in_child(PEERS[peer], copy, copied(checkpoints(folder)[DAMAGED], copy))
        if clean.value is None:
            raise RuntimeError(f"an undisturbed resume failed: {clean.failure()}")
        _finished[peer] = folder, clean
    return _finished[peer]


def copied(checkpoint: Path, into: Path) -> Path:
    shutil.rmtree(into, ignore_errors=True)
    return Path(shutil.copytree(checkpoint, into / checkpoint.name))


def resumed_after(peer: str, damage: Callable[[Path], None], **options: Any) -> Ran:
    """Resume from a copy of checkpoint DAMAGED that `damage` has altered."""
    folder = WORK / "damaged"
    checkpoint = copied(checkpoints(finished(peer)[0])[DAMAGED], folder)
    damage(checkpoint)
    if peer == "TRL":
        options["save_strategy"] = "no"
    return in_child(PEERS[peer], folder, checkpoint, **options)


def same(one: Ran, other: Ran) -> bool:
    """Bit-equal final weights, and equal losses at the steps that both took."""
    if one.value is None or other.value is None:
        return False
    count = min(len(one.value["losses"]), len(other.value["losses"]))
    losses = one.value["losses"][-count:] == other.value["losses"][-count:]
    return losses and one.value["weights"] == other.value["weights"]


def verdict(ran: Ran, clean: Ran, name: str = "") -> tuple[str, str]:
    """Outcome and detail of a resumed run: the exception and whether it names `name`, a warning, or silence."""
    if ran.value is None:
        return f"{ran.error or 'killed'}" + (
            f", {ran.names(name, checkpoints(WORK / 'damaged')[DAMAGED].name)}" if name else ""
        ), ran.failure()
    new = [line for line in ran.warnings if line not in clean.warnings]
    how = "same result as without the change" if same(ran, clean) else "result differs"
    heard = Ran(error="warning", message=new[0]).failure() if new else ""
    return f"{'warning' if new else 'silent'}, {how}", heard


def kill_anywhere() -> Iterator[Row]:
    variants: list[tuple[str, str, dict[str, Any]]] = [
        ("TRL", "dropout on", {}),
        ("accelerate", "default sampler, dropout on", {"seedable": False}),
        ("accelerate", "use_seedable_sampler, dropout on", {}),
        ("accelerate", "use_seedable_sampler, dropout off", {"dropout": 0.0}),
        ("accelerate", "use_seedable_sampler, DataLoader with its own generator, dropout on", {"generator": True}),
    ]
    for number, (peer, what, options) in enumerate(variants):
        straight = in_child(PEERS[peer], WORK / f"straight-{number}", **options)
        equal, first = [], []
        for step in KILLED_BEFORE:
            folder = WORK / f"killed-{number}-{step}"
            killed = in_child(PEERS[peer], folder, kill_before=step, **options)
            if killed.signal != signal.SIGKILL or max(checkpoints(folder)) != step:
                raise RuntimeError(f"not killed before step {step}: {killed.failure() or killed.value}")
            ran = in_child(PEERS[peer], folder, True, **options)
            equal.append(same(ran, straight))
            first.append(ran.failure() or ran.value["losses"][0] == straight.value["losses"][step])
        missed = [step for step, ok in zip(KILLED_BEFORE, equal, strict=True) if not ok]
        detail = f"unequal when killed before step {missed}; " if missed else ""
        detail += f"first loss after resuming equal in {first.count(True)} of {len(first)}"
        yield what, peer, f"{sum(equal)}/{len(equal)} bit-equal", detail


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def incomplete_newest() -> Iterator[Row]:
    weights = "model.safetensors"
    damages: list[tuple[str, Callable[[Path], Any]]] = [
        ("weights deleted", lambda checkpoint: (checkpoint / weights).unlink()),
        ("weights cut to half", lambda checkpoint: cut(checkpoint / weights)),
        ("folder empty", lambda checkpoint: [path.unlink() for path in checkpoint.iterdir()]),
    ]
    for peer in PEERS:
        source = checkpoints(finished(peer)[0])
        for what, damage in damages:
            folder = WORK / "incomplete"
            shutil.rmtree(folder, ignore_errors=True)
            for step in (DAMAGED - 1, DAMAGED):
                shutil.copytree(source[step], folder / source[step].relative_to(finished(peer)[0]))
            damage(newest(folder))
            ran = in_child(PEERS[peer], folder, True)
            if ran.value is not None:
                back = len(ran.value["losses"]) == STEPS - DAMAGED + 1
                yield what, peer, "falls back to the one before" if back else "loads it silently", ""
            else:
                yield what, peer, f"{ran.error}, no fallback, {ran.names(weights, newest(folder).name)}", ran.failure()


def flipped_bits() -> Iterator[Row]:
    files = {
        "TRL": ("model.safetensors", "optimizer.pt", "rng_state.pth"),
        "accelerate": ("model.safetensors", "optimizer.bin", "random_states_0.pkl"),
    }
    for peer, names in files.items():
        clean = finished(peer)[1]
        for name in names:
            rng = random.Random(name)
            runs = [resumed_after(peer, lambda folder, n=name, r=rng: flip(folder / n, r)) for _ in range(FLIPS)]
            found = [run for run in runs if run.value is None]
            named = sum(name in run.message for run in found)
            harmless = sum(same(run, clean) for run in runs)
            detail = f"{named} name the file; silent: {FLIPS - len(found) - harmless} with another result, "
            detail += f"{harmless} with the same"
            kinds = sorted({run.error or f"signal {run.signal}" for run in found})
            detail += f"; raised: {', '.join(kinds)}" if kinds else ""
            yield name, peer, f"{len(found)}/{FLIPS} detected", detail


def missing_files() -> Iterator[Row]:
    for peer in PEERS:
        folder, clean = finished(peer)
        for name in sorted(path.name for path in checkpoints(folder)[DAMAGED].iterdir()):
            ran = resumed_after(peer, lambda checkpoint, n=name: (checkpoint / n).unlink())
            yield f"{name} deleted", peer, *verdict(ran, clean, name)
    clean = finished("accelerate")[1]
    ran = resumed_after("accelerate", lambda checkpoint: cut(checkpoint / "random_states_0.pkl"))
    yield "random_states_0.pkl cut to half", "accelerate", *verdict(ran, clean, "random_states_0.pkl")


def drift() -> Iterator[Row]:
    changes: list[tuple[str, str, dict[str, Any]]] = [
        ("TRL", "β 0.1 → 0.5", {"beta": 0.5}),
        ("TRL", "rows in reverse order", {"rows": good_rows()[::-1]}),
        ("TRL", "schedule linear → constant", {"lr_scheduler_type": "constant"}),
        ("TRL", "learning rate 1e-3 → 1e-2", {"learning_rate": 1e-2}),
        ("TRL", "loss sigmoid → ipo", {"loss_type": ["ipo"]}),
        ("TRL", "another reference", {"reference": other_reference}),
        ("accelerate", "rows in reverse order", {"reverse": True}),
        ("accelerate", "schedule of 12 steps → of 24", {"decay": 2 * STEPS}),
    ]
    for peer, what, options in changes:
        ran = resumed_after(peer, lambda checkpoint: None, **options)
        yield what, peer, *verdict(ran, finished(peer)[1])


def tune(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def other_reference(model: Any) -> Any:
    tuned = GPT2LMHeadModel.from_pretrained(START)
    tune(tuned)
    return tuned


def sharing(model: Any) -> Any:
    """A second model whose tensors are those of the first: what a shallow copy would give."""
    twin = GPT2LMHeadModel(model.config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    return twin


def reference_identity() -> Iterator[Row]:
    tuned = in_child(trl_run, WORK / "tuned", change=tune, max_steps=1, disable_dropout=True)
    plain = in_child(trl_run, WORK / "plain", max_steps=1, disable_dropout=True)
    loss, untouched = (run.value["losses"][0][2] for run in (tuned, plain))
    outcome = f"step-0 loss {loss:.6f}" + (", ln 2" if abs(loss - math.log(2)) < 1e-6 else ", not ln 2")
    yield "ref_model=None, policy tuned in memory", "TRL", outcome, f"{untouched:.6f} where it was not tuned"
    twice = in_child(trl_run, WORK / "twice", reference=lambda model: model, max_steps=1)
    yield "same object passed twice", "TRL", twice.error or "silent", twice.failure()
    shared = in_child(trl_run, WORK / "shared", reference=sharing, disable_dropout=True)
    if shared.value is None:
        yield "two objects with the same tensors", "TRL", shared.error, shared.failure()
    else:
        losses = [entry[2] for entry in shared.value["losses"]]
        stuck = max(abs(value - math.log(2)) for value in losses) < 1e-6
        kept = "unchanged" if shared.value["reference kept"] else "changed with the policy"
        outcome = f"silent, {'loss stays ln 2' if stuck else 'loss moves'}, reference {kept}"
        yield "two objects with the same tensors", "TRL", outcome, f"loss {losses[0]:.6f} … {losses[-1]:.6f}"
    folder, clean = finished("TRL")
    kept = "unchanged at the end" if clean.value["reference kept"] else "changed"
    yield "reference of a resumed run", "TRL", kept, "sha256 of its weights"
    last = checkpoints(folder)[DAMAGED]
    ran = in_child(trl_run, WORK / "from-last", copied(last, WORK / "from-last"), start=last)
    wrong = ran.value is not None and ran.value["reference"] != clean.value["reference"]
    outcome = ran.error or ("silent, the checkpoint becomes the reference" if wrong else "reference kept")
    yield "resumed with the checkpoint's folder as the model, ref_model=None", "TRL", outcome, ran.failure()


def one_nan(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")


def infinite_gradient(model: Any) -> None:
    model.transformer.h[0].mlp.c_fc.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))


def non_finite() -> Iterator[Row]:
    plain = in_child(trl_run, WORK / "finite", max_steps=3)
    for what, change in (("NaN weight", one_nan), ("infinite gradient", infinite_gradient)):
        folder = WORK / what
        ran = in_child(trl_run, folder, change=change, max_steps=3)
        if ran.value is None:
            yield what, "TRL", ran.error, ran.failure()
            continue
        losses, logged = ran.value["losses"], ran.value["logged"]
        detail = f"losses {[round(entry[2], 4) for entry in losses]}"
        for key in ("loss", "grad_norm"):
            detail += f"; logged {key} {[round(entry[key], 4) for entry in logged]}"
        new = [line for line in ran.warnings if line not in plain.warnings]
        detail += f"; {len(checkpoints(folder))} checkpoints saved; warnings: {new[:1] or 'none'}"
        weights = "weights become NaN" if ran.value["nan"] else "weights finite"
        yield what, "TRL", f"does not stop, {len(losses)} of 3 steps taken, {weights}", detail


def bad_rows() -> dict[str, list[dict[str, Any]]]:
    """Eleven good rows and, at index BAD, one bad one of each kind."""
    good = good_rows(12)
    row = good[BAD]
    kinds: dict[str, dict[str, Any]] = {
        "None": row | {"chosen": None},
        "missing key": {key: row[key] for key in ("prompt", "chosen")},
        "not a string": row | {"chosen": 17},
        "one side empty": row | {"chosen": ""},
        "both empty": row | {"chosen": "", "rejected": ""},
        "only blanks": row | {"chosen": "   ", "rejected": " \n "},
        "identical": row | {"rejected": row["chosen"]},
        "contradictory duplicates": good[2] | {"chosen": good[2]["rejected"], "rejected": good[2]["chosen"]},
        "over-long prompt": row | {"prompt": row["prompt"] * 20},
        "lone surrogate": row | {"chosen": " \ud800 apples"},
        "HTML or NUL": row | {"chosen": " <img src=x onerror=alert(1)>\x00</pre>"},
    }
    return {kind: [*good[:BAD], bad, *good[BAD + 1 :]] for kind, bad in kinds.items()} | {"empty set": []}


def try_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    stage = "building the data set"
    try:
        data = Dataset.from_list(rows) if rows else Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []})
        stage = "making the trainer"
        options = {"max_steps": 1, "per_device_train_batch_size": 12, "disable_dropout": True, "save_strategy": "no"}
        trainer = trl_trainer(WORK / "rows", data, GPT2LMHeadModel.from_pretrained(START), **options)
        stage = "training"
        trainer.train()
    except Exception as error:
        return {"stage": stage, "ran": Ran(error=type(error).__name__, message=str(error))}
    return {"kept": len(trainer.train_dataset)}


def every_bad_row() -> Iterator[Row]:
    clean = in_child(try_rows, good_rows(12))
    for kind, rows in bad_rows().items():
        tried = in_child(try_rows, rows)
        if tried.value is None:
            yield kind, "TRL", tried.error or "killed", tried.failure()
        elif "ran" in tried.value:
            ran = tried.value["ran"]
            named = "names the row" if re.search(rf"\b{BAD}\b", ran.message) else "names no row"
            yield kind, "TRL", f"{ran.error} while {tried.value['stage']}, {named}", ran.failure()
        else:
            new = [line for line in tried.warnings if line not in clean.warnings]
            kept = tried.value["kept"]
            outcome = "trains" if kept == len(rows) else f"{len(rows) - kept} row vanishes"
            detail = f"{kept} of {len(rows)} rows kept"
            detail += f"; {Ran(error='warning', message=new[0]).failure()}" if new else ""
            yield kind, "TRL", f"{outcome}, {'warning' if new else 'silently'}", detail


def shrink(limit: int) -> list[tuple[int, int]]:
    """What find_executable_batch_size tries, as (micro-batch, accumulation), when no more than `limit` rows fit."""
    tried: list[tuple[int, int]] = []

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size: int) -> None:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        tried.append((batch_size, accelerator.gradient_accumulation_steps))
        if batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    train()
    return tried


def out_of_memory_run() -> tuple[list[Any], int]:
    trainer = trl_trainer(
        WORK / "memory", good_rows(), GPT2LMHeadModel.from_pretrained(START), auto_find_batch_size=True,
        disable_dropout=True, gradient_accumulation_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer.memory_ends_before, trainer.memory_for = 3, 3
    trainer.train()
    return trainer.seen, trainer.args.gradient_accumulation_steps


def out_of_memory() -> Iterator[Row]:
    ran = in_child(shrink, 4)
    (first, steps), (last, steps_after) = ran.value[0], ran.value[-1]
    outcome = f"effective batch {first} × {steps} = {first * steps} becomes {last} × {steps_after} = "
    outcome += f"{last * steps_after}"
    yield "find_executable_batch_size", "accelerate", outcome, f"tried {[size for size, _ in ran.value]}"
    floor = in_child(shrink, 0)
    yield "the same, nothing fits", "accelerate", floor.error or "silent", floor.failure()
    ran = in_child(out_of_memory_run)
    if ran.value is None:
        yield "auto_find_batch_size", "TRL", ran.error, ran.failure()
        return
    seen, accumulation = ran.value
    again = next(i for i in range(1, len(seen)) if seen[i][0] == 0)
    fresh = "from the first weights" if abs(seen[again][2] - math.log(2)) < 1e-6 else "with the trained weights"
    outcome = f"effective batch {seen[0][1]} becomes {seen[-1][1] * accumulation}, starts again at step 0 {fresh}"
    detail = (
        f"{again} steps done, then {len(seen) - again}; loss at step 0: {seen[0][2]:.4f}, then {seen[again][2]:.4f}"
    )
    yield "auto_find_batch_size, memory ends at step 3", "TRL", outcome, detail


def twice() -> Iterator[Row]:
    for peer, run in PEERS.items():
        one, other = (in_child(run, WORK / f"twice-{peer}-{i}") for i in range(2))
        yield "dropout on", peer, "bit-equal" if same(one, other) else "unequal", one.failure()


EXPERIMENTS = {
    "1 kill anywhere": kill_anywhere,
    "2 incomplete newest checkpoint": incomplete_newest,
    "3 one flipped bit": flipped_bits,
    "4 missing parts": missing_files,
    "5 drift on resume": drift,
    "6 reference identity": reference_identity,
    "7 non-finite": non_finite,
    "8 bad rows": every_bad_row,
    "9 out of memory": out_of_memory,
    "10 determinism": twice,
}


def measure(only: list[str]) -> list[dict[str, str]]:
    rows = []
    for test, experiment in EXPERIMENTS.items():
        if only and test.split()[0] not in only:
            continue
        started = time.monotonic()
        try:
            for what, peer, outcome, detail in experiment():
                rows.append({"test": test, "case": what, "peer": peer, "outcome": outcome, "detail": detail})
        except Exception as error:  # one experiment that cannot be run must not hide the others
            failure = Ran(error=type(error).__name__, message=str(error)).failure()
            rows.append({"test": test, "case": "", "peer": "", "outcome": "could not be run", "detail": failure})
        print(f"{test}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return rows


def table(rows: list[dict[str, str]]) -> str:
    columns = ["test", "case", "peer", "outcome", "detail"]
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the rows go")
    parser.add_argument("--only", nargs="*", default=[], help="numbers of the tests to run; all if left out")
    arguments = parser.parse_args()
    prepare()
    rows = measure(arguments.only)
    packages = ("trl", "transformers", "accelerate", "datasets", "safetensors", "torch")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    text = json.dumps({"versions": versions, "rows": rows}, indent=1, ensure_ascii=False)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
