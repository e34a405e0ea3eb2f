#!/usr/bin/env python3
"""Arithmetic word problems for the default job, and the demonstrations its tiny model is warmed up on.

Three uses, all deterministic given ``--seed``; only the last needs more than the standard library:

  make_data.py --out DIR                        train.json and val.json
  make_data.py --warmup N --out FILE            N demonstrations as JSON lines of chat messages
  make_data.py --reasoning-gym NAME --count N --out FILE
                                                questions of PyPI's reasoning-gym, in the format of train.json

A problem starts from a number and applies one or two operations, each announced by a phrase ("buys 14 more"
is +). Its identity is (phrases, numbers); a hash of the identity decides whether it may occur in validation or
elsewhere, so no seed and no later warm-up file can leak a validation problem.

The demonstrations are meant to teach the form of a solution (one fenced block, the numbers copied from the
question, the interpreter's output as the boxed answer) and to leave the choice of operations to reinforcement
learning: for the phrases marked ``clear`` they mostly apply the right operation, for all others mostly a wrong
one. A model that imitates them is right on about 40 % of problems under greedy decoding, and yet samples the
right program often enough to learn from its reward.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

CODE_PROMPT = Path(__file__).resolve().parents[2] / "worker/agent/src/agents/code_prompt.txt"

VALIDATION_ONE_IN = 8
"""One identity in this many belongs to validation."""

SMALLEST, LARGEST = 2, 99
"""Every number in a question lies in this range; results lie in 0..=LARGEST_RESULT."""
LARGEST_RESULT = 999

TWO_STEP_SHARE = 0.25
LATEX_SHARE = 0.02
LINE_BREAK_SHARE = 0.02

Message = dict[str, str]
Row = dict[str, str]

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
}

USUAL_SLIP = {"+": "-", "-": "+", "*": "+", "//": "-"}
"""The operation that demonstrations prefer where they get a phrase wrong."""


@dataclass(frozen=True)
class Phrase:
    """One way of announcing an operation; `text` may use {who}, {n} and {things}."""

    name: str
    operation: str
    text: str
    clear: bool = False
    of_containers: bool = False
    """The problem must open with containers ("has 6 boxes"), which this phrase fills."""


PHRASES = (
    Phrase("buys", "+", "{who} buys {n} more.", clear=True),
    Phrase("finds", "+", "{who} finds {n} {things}.", clear=True),
    Phrase("arrive", "+", "Then {n} more arrive.", clear=True),
    Phrase("brings", "+", "A friend brings {n}."),
    Phrase("collects", "+", "{who} collects {n} {things}."),
    Phrase("wins", "+", "{who} wins {n} in a game."),
    Phrase("gives", "-", "{who} gives {n} away.", clear=True),
    Phrase("loses", "-", "{who} loses {n}.", clear=True),
    Phrase("break", "-", "Then {n} of them break.", clear=True),
    Phrase("sells", "-", "{who} sells {n} {things}."),
    Phrase("uses", "-", "{who} uses up {n}."),
    Phrase("thief", "-", "A thief takes {n}."),
    Phrase("holds", "*", "Each holds {n} {things}.", clear=True, of_containers=True),
    Phrase("times", "*", "Soon there are {n} times as many.", clear=True),
    Phrase("turns", "*", "Each one turns into {n}."),
    Phrase("fold", "*", "The pile grows {n}-fold."),
    Phrase("piles", "//", "{who} makes {n} equal piles and keeps one."),
    Phrase("trades", "//", "{who} trades every {n} for one."),
)

PEOPLE = (
    *((name, "She") for name in "Ann Dora Emma Gina Iris Kate Mia Olga".split()),
    *((name, "He") for name in "Ben Carl Finn Hugo Jack Leo Noah Paul".split()),
)
THINGS = tuple(
    "apples balls beads books cards coins cups eggs figs keys nuts pears pens shells stamps stones tiles toys".split()
)
CONTAINERS = ("boxes", "bags", "jars", "trays", "crates")
OPENINGS = ("{name} has {n} {things}.", "{name} owns {n} {things}.", "{name} starts with {n} {things}.")
QUESTIONS = (
    "How many {things} are there now?",
    "How many {things} does {pronoun} have now?",
    "What is the number of {things} at the end?",
)


@dataclass(frozen=True)
class Noise:
    """How far the demonstrations may be trusted. Shares are probabilities in 0..=1."""

    right_when_clear: float
    right_when_unclear: float
    usual_slip: float
    """Of an unclear phrase: the share of USUAL_SLIP. What is left goes evenly to the other operations."""
    no_code: float
    """Answers at once, without running anything."""
    unboxed: float
    """Runs the code, then answers without \\boxed."""


@dataclass(frozen=True)
class Problem:
    """A question with the phrases and numbers behind it; `numbers` has one entry more than `phrases`."""

    phrases: tuple[Phrase, ...]
    numbers: tuple[int, ...]
    question: str

    @property
    def identity(self) -> str:
        return identity_of(self.phrases, self.numbers)

    @property
    def answer(self) -> int:
        return evaluate(self.numbers, [phrase.operation for phrase in self.phrases])


def identity_of(phrases: tuple[Phrase, ...], numbers: tuple[int, ...]) -> str:
    return " ".join([*(phrase.name for phrase in phrases), *map(str, numbers)])


def is_validation(identity: str) -> bool:
    """Whether what `identity` names is kept for validation, whatever the seed."""
    digest = hashlib.sha256(identity.encode()).digest()
    return int.from_bytes(digest[:8], "big") % VALIDATION_ONE_IN == 0


def evaluate(numbers: tuple[int, ...], operations: list[str]) -> int:
    """What `program` prints for the same arguments."""
    value = numbers[0]
    for operation, number in zip(operations, numbers[1:], strict=True):
        value = OPERATIONS[operation](value, number)
    return value


def program(numbers: tuple[int, ...], operations: list[str]) -> str:
    """The Python statement that prints the result, operations applied from left to right."""
    expression = str(numbers[0])
    for position, (operation, number) in enumerate(zip(operations, numbers[1:], strict=True)):
        left = f"({expression})" if position else expression
        expression = f"{left} {operation} {number}"
    return f"print({expression})"


def draw_number(rng: random.Random) -> int:
    """One digit or two with equal chance, so that a number's size says little about its operation."""
    return rng.randint(SMALLEST, 9) if rng.random() < 0.5 else rng.randint(10, LARGEST)


def is_sound(phrases: tuple[Phrase, ...], numbers: tuple[int, ...]) -> bool:
    """Whether every step stays within 0..=LARGEST_RESULT and divides without remainder."""
    value = numbers[0]
    for phrase, number in zip(phrases, numbers[1:], strict=True):
        if phrase.operation == "//" and value % number:
            return False
        value = OPERATIONS[phrase.operation](value, number)
        if not 0 <= value <= LARGEST_RESULT:
            return False
    return True


def word(phrases: tuple[Phrase, ...], numbers: tuple[int, ...], rng: random.Random) -> str:
    """The question's text."""
    name, who = rng.choice(PEOPLE)
    things = rng.choice(THINGS)
    opening_things = rng.choice(CONTAINERS) if phrases[0].of_containers else things
    number_format = "${}$" if rng.random() < LATEX_SHARE else "{}"
    separator = "\n" if rng.random() < LINE_BREAK_SHARE else " "
    first, *rest = (number_format.format(number) for number in numbers)
    sentences = [rng.choice(OPENINGS).format(name=name, n=first, things=opening_things)]
    sentences += [p.text.format(who=who, n=n, things=things) for p, n in zip(phrases, rest, strict=True)]
    sentences.append(rng.choice(QUESTIONS).format(things=things, pronoun=who.lower()))
    return separator.join(sentences)


def deck(rng: random.Random) -> Iterator[Phrase]:
    """Phrases without end, each as often as any other."""
    while True:
        yield from rng.sample(PHRASES, len(PHRASES))


def problems(rng: random.Random, validation: bool) -> Iterator[Problem]:
    """Problems without end, all from validation or all from outside it; they may repeat."""
    phrases_in_turn = deck(rng)
    for first in phrases_in_turn:
        phrases: tuple[Phrase, ...] = (first,)
        if rng.random() < TWO_STEP_SHARE:
            second = next(p for p in phrases_in_turn if p is not first)
            phrases = (second, first) if second.of_containers else (first, second)
        while True:
            numbers = tuple(draw_number(rng) for _ in range(len(phrases) + 1))
            if is_sound(phrases, numbers) and is_validation(identity_of(phrases, numbers)) == validation:
                break
        yield Problem(phrases, numbers, word(phrases, numbers, rng))


def distinct_problems(rng: random.Random, validation: bool, count: int) -> list[Problem]:
    """`count` problems of `count` identities."""
    chosen: dict[str, Problem] = {}
    for problem in problems(rng, validation):
        if len(chosen) == count:
            break
        chosen.setdefault(problem.identity, problem)
    return list(chosen.values())


def demonstrated_operation(phrase: Phrase, noise: Noise, rng: random.Random) -> str:
    """The operation that a demonstration applies for `phrase`: right with the probability that `noise` gives it."""
    others = [operation for operation in OPERATIONS if operation != phrase.operation]
    if phrase.clear:
        return phrase.operation if rng.random() < noise.right_when_clear else rng.choice(others)
    drawn = rng.random()
    if drawn < noise.right_when_unclear:
        return phrase.operation
    slip = USUAL_SLIP[phrase.operation]
    if drawn < noise.right_when_unclear + noise.usual_slip:
        return slip
    return rng.choice([operation for operation in others if operation != slip])


def demonstrate(problem: Problem, system: str, noise: Noise, rng: random.Random) -> list[Message]:
    """A chain as the code agent would record it, flawed as `noise` says; the tool's output is always true."""
    operations = [demonstrated_operation(phrase, noise, rng) for phrase in problem.phrases]
    result = evaluate(problem.numbers, operations)
    boxed = {"role": "assistant", "content": f"The answer is \\boxed{{{result}}}."}
    opening = [{"role": "system", "content": system}, {"role": "user", "content": problem.question}]
    if rng.random() < noise.no_code:
        return [*opening, boxed]
    code = program(problem.numbers, operations)
    final = {"role": "assistant", "content": f"The answer is {result}."} if rng.random() < noise.unboxed else boxed
    return [
        *opening,
        {"role": "assistant", "content": f"```python\n{code}\n```"},
        {"role": "tool", "content": f"{result}\n"},
        final,
    ]


def demonstrations(seed: int, noise: Noise, count: int) -> Iterator[list[Message]]:
    """`count` demonstrations on problems outside validation."""
    system = CODE_PROMPT.read_text(encoding="utf-8")
    rng = random.Random(f"warmup {seed}")
    source = problems(rng, validation=False)
    for _ in range(count):
        yield demonstrate(next(source), system, noise, rng)


def rows(name: str, chosen: list[Problem]) -> list[Row]:
    return [
        {"id": f"{name}-{index}", "question": problem.question, "answer": str(problem.answer)}
        for index, problem in enumerate(chosen)
    ]


def reasoning_gym_rows(task: str, seed: int, split: str, count: int) -> list[Row]:
    """`count` different questions of a reasoning-gym task that a hash of the question puts into `split`."""
    try:
        import reasoning_gym
    except ImportError:
        sys.exit(
            "make_data.py: reasoning-gym is not installed; run deploy/scripts/setup_tools.sh, then use "
            "third_party/tools-venv/bin/python"
        )
    # Few enough of any task's questions fall into a split that this leaves room for repeated ones.
    size = 4 * count * (VALIDATION_ONE_IN if split == "val" else 1)
    chosen: dict[str, str] = {}
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed)
    except ValueError as error:
        sys.exit(f"make_data.py: reasoning-gym: {error}; gsm_symbolic and chain_sum are two that it has")
    for index in range(size):
        if len(chosen) == count:
            break
        entry = dataset[index]
        if is_validation(entry["question"]) == (split == "val"):
            chosen.setdefault(entry["question"], entry["answer"])
    if len(chosen) < count:
        sys.exit(
            f"make_data.py: {task} gave {len(chosen)} different {split} questions in {size} tries, "
            f"{count} were asked for; ask for fewer"
        )
    return [
        {"id": f"{task}-{split}-{index}", "question": question, "answer": answer}
        for index, (question, answer) in enumerate(chosen.items())
    ]


def write_atomically(path: Path, text: str) -> None:
    """Writes `path` whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: object) -> None:
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def add_noise_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("noise of the demonstrations")
    group.add_argument(
        "--right-when-clear",
        type=share,
        default=0.9,
        metavar="P",
        help="share of right operations for clear phrases (%(default)s)",
    )
    group.add_argument(
        "--right-when-unclear",
        type=share,
        default=0.40,
        metavar="P",
        help="share of right operations for all other phrases (%(default)s)",
    )
    group.add_argument(
        "--usual-slip",
        type=share,
        default=0.53,
        metavar="P",
        help="share of the usual wrong operation for those phrases (%(default)s)",
    )
    group.add_argument(
        "--no-code",
        type=share,
        default=0.08,
        metavar="P",
        help="share of answers given without running code (%(default)s)",
    )
    group.add_argument(
        "--unboxed", type=share, default=0.04, metavar="P", help="share of answers without \\boxed (%(default)s)"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="all output depends on it alone (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="a folder, or the file for the other two uses")
    parser.add_argument("--train-count", type=positive, default=2000, metavar="N", help="(%(default)s)")
    parser.add_argument("--val-count", type=positive, default=128, metavar="N", help="(%(default)s)")
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--warmup", type=positive, metavar="N", help="write N demonstrations")
    use.add_argument(
        "--reasoning-gym", metavar="NAME", help="write questions of this task, e.g. gsm_symbolic, chain_sum"
    )
    parser.add_argument(
        "--count", type=positive, default=1000, metavar="N", help="reasoning-gym questions (%(default)s)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        default="train",
        help="which of two disjoint sets of reasoning-gym questions (%(default)s)",
    )
    add_noise_options(parser)
    arguments = parser.parse_args()
    if arguments.right_when_unclear + arguments.usual_slip > 1:
        parser.error("--right-when-unclear and --usual-slip add up to more than 1")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    seed, out = arguments.seed, arguments.out
    if arguments.warmup:
        noise = Noise(
            arguments.right_when_clear,
            arguments.right_when_unclear,
            arguments.usual_slip,
            arguments.no_code,
            arguments.unboxed,
        )
        lines = (json.dumps({"messages": m}, ensure_ascii=False) for m in demonstrations(seed, noise, arguments.warmup))
        write_atomically(out, "\n".join(lines) + "\n")
    elif arguments.reasoning_gym:
        write_json(out, reasoning_gym_rows(arguments.reasoning_gym, seed, arguments.split, arguments.count))
    else:
        for name, count in (("train", arguments.train_count), ("val", arguments.val_count)):
            chosen = distinct_problems(random.Random(f"{name} {seed}"), name == "val", count)
            write_json(out / f"{name}.json", rows(name, chosen))


if __name__ == "__main__":
    main()
