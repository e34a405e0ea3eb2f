"""One model, every check: this project's figures beside those of `transformers`."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
import truth
from probe import Probe
from report import TIE, Findings
from texts import Texts

NEW_TOKENS = 24
"""Length of a greedy continuation."""
NO_ERROR = 1e-12
"""Far below what bf16 can get wrong."""


class Bf16Errors:
    """Of each model our root-mean-square distance from float64 over theirs; of a group the geometric mean, in which
    no single model outweighs the others."""

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {}

    def add(self, check: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
        # A model whose vocabulary leaves no choice has no error to compare.
        our_error, their_error = (
            max((side.double() - exact.double()).norm().item(), NO_ERROR) for side in (ours, theirs)
        )
        self.ratios.setdefault(check, []).append(our_error / their_error)

    def report(self, findings: Findings, group: str) -> None:
        for check, ratios in self.ratios.items():
            mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
            findings.add(check, group, mean, f"the mean of {len(ratios)} models")


def largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item() if difference.numel() else 0.0


def compare(
    findings: Findings, errors: Bf16Errors, probe: Probe, group: str, name: str, folder: Path, texts: Texts, seed: int
) -> None:
    """Runs every check on the model in `folder`.

    Raises:
        ProbeError: when our side refuses what the other computes.
    """
    random = Random(f"checks {seed} {name}")
    settings = {"temperature": random.choice([1.0, 0.7, 1.3]), "entropy_coeff": random.choice([0.0, 0.05])}
    exact = truth.load(folder, "f64")
    exact_scores = truth.scores(exact, texts.rows)
    exact_gradients = truth.gradients(exact, texts.loss_rows, **settings)
    del exact
    single = truth.load(folder, "f32")

    probe.open(folder, "f32")
    single_scores = truth.scores(single, texts.rows)
    our_scores = probe.scores(texts.rows)
    for key in ("log_probs", "entropies"):
        findings.add(key, group, largest(our_scores[key] - single_scores[key]), name)
        findings.add(f"exact_{key}", group, largest(our_scores[key] - exact_scores[key]), name)
    check_logits(findings, probe, single, group, name, texts)
    # Two cuts of the batch: some rows at a time, and each alone.
    longest = max(len(row["ids"]) for row in texts.loss_rows)
    for budget in (2 * longest, 1):
        ours = probe.gradients(texts.loss_rows, micro_batch_tokens=budget, **settings)
        # From float64: transformers' own float32 is as far from it as the bound on the largest model.
        findings.add("gradients", group, gradient_distance(ours, exact_gradients), name)
    check_greedy(findings, probe, single, group, name, texts.prompts)
    check_turns(findings, probe, single, group, name, texts.chains)
    del single
    check_export(findings, probe, group, name, folder, texts)

    rounded = truth.load(folder, "bf16")
    probe.open(folder, "bf16")
    theirs = truth.scores(rounded, texts.rows)
    ours = probe.scores(texts.rows)
    for key in ("log_probs", "entropies"):
        errors.add(f"bf16_{key}", ours[key], theirs[key], exact_scores[key])
    their_gradients = truth.gradients(rounded, texts.loss_rows, **settings)
    our_gradients = probe.gradients(texts.loss_rows, micro_batch_tokens=2 * longest, **settings)
    errors.add(
        "bf16_gradients",
        flat(our_gradients, exact_gradients),
        flat(their_gradients, exact_gradients),
        flat(exact_gradients),
    )


def flat(gradients: dict[str, torch.Tensor], order: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    return torch.cat([gradients[name].flatten().double() for name in (order or gradients)])


def gradient_distance(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Of each parameter the distance over the gradient's size, where that counts as at least a thousandth of the
    whole gradient's; the worst. Infinite when a parameter is missing on either side."""
    if ours.keys() != exact.keys():
        return float("inf")
    whole = flat(exact).norm().item()
    distances = []
    for name, gradient in exact.items():
        difference = (ours[name].double() - gradient.double()).norm().item()
        distances.append(difference / max(gradient.double().norm().item(), 1e-3 * whole))
    return max(distances)


def check_logits(findings: Findings, probe: Probe, exact: Any, group: str, name: str, texts: Texts) -> None:
    ours = probe.logits(texts.rows)
    theirs = torch.cat([truth.logits(exact, row) for row in texts.rows])
    findings.add("logits", group, largest(ours - theirs) / largest(theirs), name)


def check_greedy(findings: Findings, probe: Probe, exact: Any, group: str, name: str, prompts: list[list[int]]) -> None:
    chains = [{"turns": [{"new_tokens": prompt, "max_tokens": NEW_TOKENS}]} for prompt in prompts]
    ours = probe.greedy(chains, max_slots=16, max_prefill_tokens=64, cache_tokens=1 << 14)
    theirs = truth.greedy(exact, prompts, NEW_TOKENS)
    parted = tied = 0
    for prompt, (turn,), other in zip(prompts, ours, theirs, strict=True):
        at = first_difference(turn["ids"], other)
        if at is None:
            continue
        last = truth.logits(exact, prompt + other[:at])[-1]
        if (last[other[at]] - last[turn["ids"][at]]).abs().item() <= TIE:
            tied += 1
        else:
            parted += 1
    findings.add("greedy", group, parted, name)
    findings.add("ties", group, tied / len(prompts), name)
    findings.notes["continuations"] = findings.notes.get("continuations", 0) + len(prompts)
    findings.notes["tied_continuations"] = findings.notes.get("tied_continuations", 0) + tied


def first_difference(ours: list[int], theirs: list[int]) -> int | None:
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} tokens continued, {len(theirs)} there")
    return next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)


def check_turns(
    findings: Findings, probe: Probe, exact: Any, group: str, name: str, chains: list[list[dict[str, Any]]]
) -> None:
    """Chains of several turns, each twice in a group, against one forward pass over each whole chain: prefilled in
    stretches of at most 24 tokens, with fewer slots than chains, and with a cache for the longest alone, so that
    chains lose theirs."""
    twice = [{"group": group, "turns": turns} for group, turns in enumerate(chains) for _ in range(2)]
    sampled = probe.greedy(twice, max_slots=5, max_prefill_tokens=24, cache_tokens=1)
    not_greedy, worst = 0, 0.0
    for turns, results in zip([chain["turns"] for chain in twice], sampled, strict=True):
        whole: list[int] = []
        for turn, result in zip(turns, results, strict=True):
            whole += turn["new_tokens"] + result["ids"]
        logits = truth.logits(exact, whole)
        log_probs = logits.log_softmax(-1)
        at = 0
        for turn, result in zip(turns, results, strict=True):
            at += len(turn["new_tokens"])
            for token, log_prob in zip(result["ids"], result["log_probs"], strict=True):
                before = logits[at - 1]
                not_greedy += int((before.max() - before[token]).item() > TIE)
                worst = max(worst, abs(log_probs[at - 1, token].item() - log_prob))
                at += 1
    findings.add("turn_tokens", group, not_greedy, name)
    findings.add("turn_log_probs", group, worst, name)


def check_export(findings: Findings, probe: Probe, group: str, name: str, folder: Path, texts: Texts) -> None:
    """The model as it is, from f32 and bf16, with its own config.json and with ours; then fresh weights of ours."""
    rows = [max(texts.rows, key=len), *texts.rows[:2]]
    target = folder.parent / f"{folder.name}.exported"

    def exported(source: Path | None) -> Path:
        shutil.rmtree(target, ignore_errors=True)
        probe.ask("export", to=target, source=source)
        return target

    for dtype in ("f32", "bf16"):
        probe.open(folder, dtype)
        for source in (folder, None):
            differing = weights_differing(truth.load(exported(source), dtype), truth.load(folder, dtype))
            findings.add("export_weights", group, differing, f"{name} in {dtype}")
    probe.ask("random", model=folder, seed=5)
    ours = probe.scores(rows)["log_probs"]
    theirs = truth.scores(truth.load(exported(None), "f32"), rows)["log_probs"]
    findings.add("export_log_probs", group, largest(ours - theirs), f"{name}, fresh weights")
    shutil.rmtree(target, ignore_errors=True)


def weights_differing(one: Any, other: Any) -> int:
    a, b = one.state_dict(), other.state_dict()
    if a.keys() != b.keys():
        return len(a.keys() ^ b.keys())
    return sum(not torch.equal(a[name], b[name]) for name in a)
