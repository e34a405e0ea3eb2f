# Compares two mathematical expressions written as LaTeX. Defines functions only: the reward appends one call,
# whose arguments are string literals. Prints one word: EQUAL, DIFFERENT or UNPARSED.
import re

REMOVED_WORDS = (
    "square ways integers dollars mph inches ft hours km units points feet minutes digits cents degrees cm gm pounds "
    "meters meals edges students childrentickets multiples"
).split()
REMOVED_TEXT = [r"\$", "$", r"\%", "%", r"\!", r"\,", r"\;", r"\:", "^{\\circ}", "^\\circ", '"', r"\dots", r"\ "]


def parse(text):
    from latex2sympy2_extended import latex2sympy

    if "\\fbox" in text or "\\boxed" in text:  # sympy's own parser knows neither; this one would unwrap them
        raise ValueError("a box that was not extracted")
    parsed = latex2sympy(text)
    if parsed is None:
        raise ValueError("nothing parsed")
    return parsed


def same(a, b):
    if a == b:
        return True
    try:
        return bool(a.evalf() == b.evalf())
    except AttributeError:
        return False


def without_text(text):
    """Keeps what \\text{…}, \\textbf{…}, \\overline{…} and \\boxed{…} wrap; drops units and decorations."""
    text = text.split("=")[-1]
    for old in REMOVED_TEXT:
        text = text.replace(old, "")
    for word in REMOVED_WORDS:
        text = re.sub(r"(?<![a-zA-Z\\])" + word + r"(?![a-zA-Z])", "", text)
    text = text.replace(r"\left", "").replace(r"\right", "").replace("tfrac", "frac").replace("dfrac", "frac")
    text = re.sub(r"\\(?:text|textbf|mbox|mathrm|overline|boxed)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    text = text.strip()
    if text.replace(",", "").isdigit():
        text = text.replace(",", "")
    return text


def parity(a, b):
    """AgentFly's rule: structurally equal, or equal as decimal numbers; nothing is simplified."""
    import latex2sympy2_extended  # noqa: F401  here, so that a missing package is an error and not "different"

    try:
        if same(parse(a), parse(b)):
            return "EQUAL"
    except Exception:
        pass
    a, b = without_text(a), without_text(b)
    try:
        return "EQUAL" if same(parse(a), parse(b)) else "DIFFERENT"
    except Exception:
        return "EQUAL" if a == b else "UNPARSED"


def strict(a, b):
    """Equal as mathematics: expressions by simplification; tuples, sets and intervals entry by entry."""
    from math_verify import LatexExtractionConfig, parse as extract, verify

    def value(text):
        return extract("\\boxed{" + text + "}", [LatexExtractionConfig()], parsing_timeout=None, raise_on_error=False)

    gold, answer = value(b), value(a)
    if not gold or not answer:
        return "UNPARSED"
    equal = verify(gold, answer, strict=True, timeout_seconds=None, raise_on_error=False)
    return "EQUAL" if equal else "DIFFERENT"
