"""The comparisons: what the sides of each are asked, and which figures come of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import work
from bench import Bench
from report import Row, Values, values
from side import Measurement, Side
from traces import add_steps

WARM_UP_TOKENS = 8
NO_TIME_SECONDS = 1e-3
"""A phase below it did not take place."""
MB_OF_MEMORY_BAR = 1500
SECONDS_TO_FIRST_TOKEN_BAR = 2
SMALLER: dict[str, Any] = {"larger_is_better": False}


def new_tokens_per_second(run: Measurement) -> float:
    """Sampled tokens by the wall clock."""
    return run.total("new_tokens") / run.seconds


def peak_mb(run: Measurement) -> float:
    """Memory at its highest."""
    return run.peak_mb


def present(sides: list[Side | None]) -> list[Side]:
    """Those that are set up."""
    return [side for side in sides if side is not None]


def name_of(ours: list[Side], runs: dict[str, list[Measurement]]) -> str:
    """Our chosen split, if it has figures."""
    return next((side.name for side in ours if runs.get(side.name)), "")


def rollout(bench: Bench, dtype: str) -> None:
    """Generation: tokens a second, seconds to the first token, memory."""
    places, note, slots = bench.places, f"rollout {dtype}", max(bench.batches)
    splits = [places.ours("rollout", dtype, split, slots) for split in places.splits(min(bench.batches))]
    peers = {"vllm": places.peer("vllm", "rollout_vllm.py", dtype),
             "transformers": places.peer("transformers", "rollout_hf.py", dtype)}
    chosen: dict[int, list[Side]] = {}
    slower: dict[int, dict[str, list[Measurement]]] = {}
    for batch in bench.batches:
        request = {"batch": batch, "new_tokens": work.NEW_TOKENS}
        chosen[batch], slower[batch] = bench.choose_split(splits, request, f"{note} batch {batch}",
                                                          new_tokens_per_second)
    ours = [side for side in splits if any(side in best for best in chosen.values())]
    with bench.running(ours + present(list(peers.values())), {"batch": 1, "new_tokens": 1, "seed": 0}, note) as ready:
        runs: dict[str, list[Measurement]] = {}
        best = ""
        for batch in bench.batches:
            here, request = f"{note} batch {batch}", {"batch": batch, "new_tokens": work.NEW_TOKENS}
            sides = chosen[batch] + present(list(peers.values()))
            for side in sides:
                bench.ask(side, {**request, "new_tokens": WARM_UP_TOKENS, "seed": 0}, here)
            runs = bench.take_turns(sides, request, here, lambda run: f"{new_tokens_per_second(run):.0f} tokens/s")
            best = name_of(chosen[batch], runs)
            rates = {name: values(name, "tokens/s", taken, new_tokens_per_second)
                     for name, taken in {**runs, **slower[batch]}.items()}
            mine = rates.get(best)
            for name, bar in (("vllm", 1.5), ("transformers", 3.0))[: 2 if bench.peers else 1]:
                bench.report.rows.append(Row("rollout", f"batch {batch}", dtype, mine, rates.get(name), bench.bar(bar),
                                             missing=bench.missing(name, peers[name], here)))
            for name in slower[batch]:
                bench.report.rows.append(Row("rollout", f"batch {batch}, other split", dtype, rates[name],
                                             ratio_is_the_bar=False))
            if mine:
                bench.shares.append(("rollout", f"batch {batch}", dtype, mine, 2, 50.0 if batch >= 64 else None))
    firsts = {name: [started.first] for name, started in ready.items()}
    once = {name: values(name, "s", first, lambda _, name=name: ready[name].seconds, **SMALLER)
            for name, first in firsts.items()}
    loading = {name: values(name, "MB", first, peak_mb, **SMALLER) for name, first in firsts.items()}
    peak = {name: values(name, "MB", taken, peak_mb, **SMALLER) for name, taken in runs.items()}
    for what, limit, table in (("start to first token", SECONDS_TO_FIRST_TOKEN_BAR, once),
                               ("memory while loading", MB_OF_MEMORY_BAR, loading),
                               (f"peak memory, batch {bench.batches[-1]}", MB_OF_MEMORY_BAR, peak)):
        for name in peers:
            if name == "vllm" or name in table:
                bench.report.rows.append(Row("rollout", what, dtype, table.get(best), table.get(name),
                                             bench.bar(limit, at_least=False), ratio_is_the_bar=False))


def multi_turn(bench: Bench, dtype: str) -> None:
    """Chains with tools between their turns, against vLLM's server with its prefix cache."""
    places, note, chains = bench.places, f"multi-turn {dtype}", int(work.MULTI_TURN["chains"])
    splits = [places.ours("multi-turn", dtype, split, chains) for split in places.splits(chains)]
    ours, slower = bench.choose_split(splits, work.MULTI_TURN, note, new_tokens_per_second)
    server = places.peer("vllm server", "multi_turn_vllm.py", dtype)
    sides = ours + present([server])
    with bench.running(sides, {**work.MULTI_TURN, "new_tokens": WARM_UP_TOKENS, "seed": 0}, note):
        runs = bench.take_turns(sides, work.MULTI_TURN, note, lambda run: f"{new_tokens_per_second(run):.0f} tokens/s")
    best = name_of(ours, runs)
    what = "{chains} chains, {turns} turns".format(**work.MULTI_TURN)

    def rate(name: str) -> Values | None:
        return values(name, "tokens/s", {**runs, **slower}.get(name, []), new_tokens_per_second)

    bench.report.rows.append(Row("multi-turn", what, dtype, rate(best), rate("vllm server"), bench.bar(2.0),
                                 missing=bench.missing("vllm server", server, note)))
    for name in slower:
        bench.report.rows.append(Row("multi-turn", f"{what}, other split", dtype, rate(name), ratio_is_the_bar=False))
    counted = {name: values(name, "% of context", taken, prefilled_percent, **SMALLER) for name, taken in runs.items()}
    bench.report.rows.append(Row("multi-turn", "tokens prefilled", dtype, counted.get(best),
                                 counted.get("vllm server"), ratio_is_the_bar=False))


def prefilled_percent(run: Measurement) -> float:
    """Tokens computed by prefill, of those in the contexts of all turns."""
    if "cached_tokens" in run.answers[0]:
        computed = run.total("context_tokens") - run.total("cached_tokens")
    else:
        computed = run.total("prefill_tokens")
    return 100 * computed / run.total("context_tokens")


def learner(bench: Bench, dtype: str) -> None:
    """A training step: forward and backward, the reference's log-probs, the optimizer, memory.

    With several ranks a phase is as long as on its slowest rank, and what they exchange belongs to the work that needs
    it: summing gradients to forward and backward, fetching the weights that others updated to the optimizer.
    """
    places, note = bench.places, f"learner {dtype}"
    hf = places.peer("transformers", "learner_hf.py", dtype)
    rows, tokens = work.LEARNER["rows"], work.LEARNER["rows"] * work.LEARNER["tokens"]

    def step(run: Measurement) -> float:
        return tokens / run.inner_seconds()

    def forward_backward(run: Measurement) -> float:
        return tokens / (run.phase("forward_backward") + run.phase("all_reduce"))

    def reference(run: Measurement) -> float:
        return tokens / run.phase("reference")

    def milliseconds(run: Measurement) -> float:
        seconds = run.phase("optimizer") + run.phase("all_gather")
        return 1e3 * seconds * work.OPTIMIZER_PARAMETERS / float(run.answers[0]["parameters"])

    splits = [places.ours("learner", dtype, split) for split in places.splits(rows)]
    ours, slower = bench.choose_split(splits, work.LEARNER, note, step)
    sides = ours + present([hf])
    with bench.running(sides, {**work.LEARNER, "seed": 0}, note):
        runs = bench.take_turns(sides, work.LEARNER, note, lambda run: f"{step(run):.0f} tokens/s")
    best, peer = name_of(ours, runs), runs.get("transformers", [])
    what, missing = "{rows} × {tokens} tokens".format(**work.LEARNER), bench.missing("transformers", hf, note)
    for name, taken in {best: runs.get(best, []), **slower}.items():
        chosen = name == best
        for title, rate, bar in (("whole step", step, None), ("forward+backward", forward_backward, 1.5),
                                 ("reference log-probs", reference, 1.5)):
            title = f"{title}, {what}" + ("" if chosen else ", other split")
            mine = values(name, "tokens/s", taken, rate)
            theirs = values("transformers", "tokens/s", peer, rate) if chosen else None
            bench.report.rows.append(Row("learner", title, dtype, mine, theirs,
                                         bench.bar(bar) if chosen and bar else None, ratio_is_the_bar=chosen,
                                         missing=missing))
            if chosen and mine and rate is forward_backward:
                bench.shares.append(("learner", title, dtype, mine, 6, 55.0))
    own = runs.get(best, [])
    ranks = len(own[0].answers) if own else 0
    note = f"{ranks} rank{'' if ranks == 1 else 's'}"
    bench.report.rows.append(Row(
        "learner", "optimizer step, of 50M parameters", dtype,
        values(best, "ms", own, milliseconds, note=note, **SMALLER),
        values("transformers", "ms", peer, milliseconds, **SMALLER), bench.bar(40, at_least=False),
        ratio_is_the_bar=False))
    bench.report.rows.append(Row("learner", "peak memory", dtype, values(best, "MB", own, peak_mb, **SMALLER),
                                 values("transformers", "MB", peer, peak_mb, **SMALLER), ratio_is_the_bar=False))


def generated(run: Measurement) -> float:
    """Seconds of generation: the slowest rank's."""
    return max(float(answer.get("generate", 0.0)) for answer in run.answers) or run.phase("generate")


def hashed(run: Measurement) -> float:
    """Seconds in which ranks attest their weights."""
    return max(float(answer.get("hash", 0.0)) for answer in run.answers)


GRPO_PARTS: list[tuple[str, Callable[[Measurement], float]]] = [
    ("generation", generated),
    ("old log-probs", lambda run: run.phase("old_log_prob")),
    ("forward+backward", lambda run: run.phase("forward_backward") or run.phase("forward") + run.phase("backward")),
    ("summing gradients", lambda run: run.phase("all_reduce")),
    ("optimizer", lambda run: run.phase("optimizer")),
    ("gathering weights", lambda run: run.phase("all_gather")),
    ("hash of the weights", hashed),
]
"""Of a step, in the order in which they follow each other."""


def grpo(bench: Bench, dtype: str) -> None:
    """A whole GRPO step, against TRL's; with where its seconds go."""
    places, note = bench.places, f"GRPO {dtype}"
    splits = places.splits(work.GRPO["completions"] // work.GROUP, even=True)
    ours, slower = bench.choose_split([places.ours("grpo", dtype, split) for split in splits], work.GRPO, note,
                                      lambda run: 1 / run.inner_seconds())
    trl = places.peer("TRL", "grpo_trl.py", dtype)
    sides = ours + present([trl])
    with bench.running(sides, {**work.GRPO, "seed": 0}, note):
        runs = bench.take_turns(sides, work.GRPO, note, lambda run: f"{run.inner_seconds():.2f} s")
    best, peer = name_of(ours, runs), runs.get("TRL", [])
    missing = bench.missing("TRL", trl, note)
    what = "step, {completions} completions × {new_tokens} tokens".format(**work.GRPO)
    for name, taken in {best: runs.get(best, []), **slower}.items():
        chosen = name == best
        bench.report.rows.append(Row(
            "grpo", what + ("" if chosen else ", other split"), dtype,
            values(name, "s", taken, Measurement.inner_seconds, **SMALLER),
            values("TRL", "s", peer, Measurement.inner_seconds, **SMALLER) if chosen else None,
            bench.bar(2.0) if chosen else None, ratio_is_the_bar=chosen, missing=missing))
        add_steps(bench.traces, f"{name} {dtype}", taken)
    own = runs.get(best, [])
    for part, seconds in GRPO_PARTS:
        theirs = values("TRL", "s", peer, seconds, **SMALLER)
        if theirs and not theirs.best():
            theirs = None
        mine = values(best, "s", own, seconds, **SMALLER)
        if theirs is None and mine and mine.median() < NO_TIME_SECONDS:
            continue
        bench.report.rows.append(Row("grpo", f"of which {part}", dtype, mine, theirs, ratio_is_the_bar=False))
    bench.report.rows.append(Row(
        "grpo", "peak memory (ratio: TRL's over ours)", dtype, values(best, "MB", own, peak_mb, **SMALLER),
        values("TRL", "MB", peer, peak_mb, **SMALLER), bench.bar(2.0), missing=missing))


SECTIONS: dict[str, Callable[[Bench, str], None]] = {
    "rollout": rollout, "multi_turn": multi_turn, "learner": learner, "grpo": grpo,
}
