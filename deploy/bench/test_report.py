"""What the table says: ratios, bars, noise and what is missing."""

from __future__ import annotations

import unittest

from report import Bar, Report, Row, Values, values
from side import Measurement


def side(*numbers: float, larger_is_better: bool = True, noise: float = 0.0, caveat: str = "") -> Values:
    """A side's figures, with the cores that others took."""
    return Values("one", "x", list(numbers), [noise] * len(numbers), larger_is_better, caveat=caveat)


class Figures(unittest.TestCase):
    """One side's repeats, and how it compares."""

    def test_the_best_is_the_largest_or_the_smallest(self) -> None:
        self.assertEqual((side(1, 5, 3).best(), side(1, 5, 3).median()), (5, 3))
        self.assertEqual(side(1, 5, 3, larger_is_better=False).best(), 1)

    def test_a_gain_is_above_one_where_ours_is_better(self) -> None:
        self.assertEqual(side(6).gain_over(side(2), Values.median), 3)
        seconds = side(2, larger_is_better=False), side(6, larger_is_better=False)
        self.assertEqual(seconds[0].gain_over(seconds[1], Values.median), 3)

    def test_values_keep_what_disturbed_and_what_lacked(self) -> None:
        runs = [Measurement(1.0, [{}], 10.0, noise, "no tcmalloc") for noise in (0.0, 0.4)]
        found = values("vllm", "MB", runs, lambda run: run.peak_mb)
        assert found is not None
        self.assertEqual((found.values, found.noise(), found.caveat), ([10.0, 10.0], 0.4, "no tcmalloc"))
        self.assertIsNone(values("vllm", "MB", [], lambda run: run.peak_mb))


class Verdicts(unittest.TestCase):
    """A row against its bar."""

    def row(self, ours: Values | None, peer: Values | None = None, bar: Bar | None = None, *, ratio: bool = True,
            missing: str = "") -> Row:
        """A row of a section."""
        return Row("rollout", "batch 16", "bf16", ours, peer, bar, ratio_is_the_bar=ratio, missing=missing)

    def test_a_ratio_is_held_against_the_bar_by_medians(self) -> None:
        for ours, verdict in ((3.0, "pass"), (2.9, "FAIL")):
            row = self.row(side(ours, 100, 0), side(2), Bar(1.5))
            self.assertEqual((row.verdict(), row.failed()), (verdict, verdict == "FAIL"))

    def test_a_limit_holds_for_ours_alone(self) -> None:
        for ours, verdict in ((1500, "pass"), (1501, "FAIL")):
            row = self.row(side(ours), side(1), Bar(1500, at_least=False), ratio=False)
            self.assertEqual(row.verdict(), verdict)

    def test_without_a_peer_there_is_no_verdict_but_the_reason(self) -> None:
        row = self.row(side(3), None, Bar(1.5), missing="vllm not set up: make bench-setup")
        self.assertEqual((row.verdict(), row.failed()), ("vllm not set up: make bench-setup", False))
        self.assertEqual(self.row(None, side(2), Bar(1.5)).verdict(), "not measured")
        self.assertEqual(self.row(side(3)).verdict(), "")

    def test_doubts_stand_beside_the_verdict(self) -> None:
        row = self.row(side(3, noise=0.3), side(2, caveat="vllm without tcmalloc"), Bar(1.5))
        self.assertEqual(row.verdict(), "pass (others took 0.3 cores, vllm without tcmalloc)")
        self.assertEqual(self.row(side(3, noise=0.1), side(2), Bar(1.5)).verdict(), "pass")

    def test_table_and_json_say_the_same(self) -> None:
        report = Report([self.row(side(3, 5, 4), side(2), Bar(1.5))])
        self.assertIn("5 / 4 x (one)", report.table())
        self.assertIn("2.00 (2.50)   ≥ 1.5  pass", report.table())
        (row,) = report.json()["rows"]
        self.assertEqual((row["ratio"], row["bar"], row["verdict"]), ({"best": 2.5, "median": 2.0}, "≥ 1.5", "pass"))


if __name__ == "__main__":
    unittest.main()
