"""What the table says of figures at, below and beyond their bounds, and of those that are no numbers."""

from __future__ import annotations

import unittest

from report import CHECKS, Findings


class Verdicts(unittest.TestCase):
    """Findings against their bounds."""

    def test_nothing_found_is_no_pass(self) -> None:
        self.assertFalse(Findings().all_passed())

    def test_a_figure_at_its_bound_passes_and_one_beyond_it_names_its_model(self) -> None:
        findings = Findings()
        findings.add("logits", "qwen2", CHECKS["logits"].bound, "qwen2-1")
        self.assertTrue(findings.all_passed())
        findings.add("logits", "qwen2", 2 * CHECKS["logits"].bound, "qwen2-2")
        findings.add("logits", "qwen2", 0.0, "qwen2-3")
        self.assertFalse(findings.all_passed())
        self.assertIn("0.0002 exceeds 0.0001 in qwen2-2", findings.table())
        (figure,) = findings.json()["figures"]
        self.assertEqual((figure["passed"], figure["where"], figure["of"]), (False, "qwen2-2", 3))

    def test_a_nan_is_the_worst_whenever_it_comes(self) -> None:
        for figures in ([0.0, float("nan")], [float("nan"), 0.0]):
            findings = Findings()
            for figure in figures:
                findings.add("greedy", "edges", figure, "one")
            self.assertFalse(findings.all_passed(), figures)

    def test_what_could_not_be_compared_fails_the_run(self) -> None:
        findings = Findings()
        findings.add("logits", "qwen3", 0.0, "qwen3-1")
        findings.failures.append("qwen3-2: the probe ended with status 1")
        self.assertFalse(findings.all_passed())
        self.assertIn("FAIL  qwen3-2: the probe ended with status 1", findings.table())

    def test_groups_stand_beside_each_other_and_gaps_are_dashes(self) -> None:
        findings = Findings()
        findings.add("logits", "qwen2", 1e-6, "a")
        findings.add("greedy", "edges", 0.0, "b")
        head, first = findings.table().splitlines()[:2]
        self.assertEqual(head.split()[-2:], ["qwen2", "edges"])
        self.assertEqual(first.split()[-2:], ["1e-06", "-"])


if __name__ == "__main__":
    unittest.main()
