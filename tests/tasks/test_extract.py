"""Numbers and programs found in replies that are labelled by hand, and what holds of any text."""

import ast
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged_replies import (
    AREA,
    FENCES_INSIDE,
    MATH,
    NO_NUMBERS,
    NUMBERS,
    RIGHT_PROGRAMS,
    WRONG_PROGRAMS,
)

from tasks.extract import code_of, flexible_number, is_python, same_number, strict_number
from tasks.math import judge_math
from tasks.scores import words_of


@pytest.mark.parametrize("written, number", NUMBERS)
def test_numbers_are_read_in_every_spelling(written, number):
    for text in (f"#### {written}", f"6 * 7\n####{written}\n\nNext: see below", f"#### {written}."):
        assert same_number(strict_number(text), number)
    for text in (f"It is {written}", f"so x = {written}, and no more", f"12:30, ({written})\n"):
        assert same_number(flexible_number(text), number) and strict_number(text) is None


@pytest.mark.parametrize("written", NO_NUMBERS)
def test_what_is_no_number_is_not_read_in_part(written):
    assert strict_number(f"#### {written}") is None
    assert strict_number(f"#### {written} dollars") is None
    assert flexible_number(f"It is {written}, or so") is None


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("#### 3\n#### 4", 4, 4),
        ("####\n 3", 3, 3),
        ("#### 3\n\nQuestion: what is 5 + 5?", 3, 5),
        ("#### three, or 3", None, 3),
        ("#### 18 = 18", 18, 18),
        ("#### 18 (9 * 2)", None, 2),
        ("The answer is 7.", None, 7),
        ("10 - 5", None, 5),
        ("<<36/2=18>>18", None, 18),
        ("of covid-19", None, 19),
        ("(a)-2", None, 2),
        ("[1, 2, 3]", None, 3),
        ("7\n####", None, 7),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_where_numbers_are_looked_for(text, strict, flexible):
    assert (strict_number(text), flexible_number(text)) == (strict, flexible)


@given(st.integers(-(10**12), 10**12))
def test_a_number_is_read_as_it_is_written(number):
    for text in (f"#### {number}", f"#### {number:,}.", f"so\n####${number:,}"):
        assert strict_number(text) == flexible_number(text) == number


@given(st.integers(0, 999), st.integers(1, 99), st.sampled_from("/:.,-–^x"))
def test_two_numbers_in_one_are_not_read_as_the_first(a, b, between):
    text = f"#### {a}{between}{b}"
    values = {"/": a / b, ".": float(f"{a}.{b}"), "^": 10.0**b if a == 10 else None}
    assert strict_number(text) == flexible_number(text) == values.get(between)
    assert strict_number(f"{text}{between}{a}") is None


@given(st.fractions(min_value=-99, max_value=99, max_denominator=99))
def test_a_fraction_is_its_value(fraction):
    sign, (whole, rest) = "-" * (fraction < 0), divmod(abs(fraction), 1)
    top, bottom = abs(fraction.numerator), fraction.denominator
    texts = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}", str(float(fraction))]
    if whole and rest:
        texts += [f"{sign}{whole} {rest}", rf"{sign}{whole}\frac{{{rest.numerator}}}{{{bottom}}}"]
    for text in texts:
        assert strict_number(f"#### {text}") == pytest.approx(float(fraction))


@pytest.mark.parametrize("reference, reply, strict, flexible", MATH)
def test_math_is_judged_where_the_reference_has_a_number(reference, reply, strict, flexible):
    expected = {"strict": strict, "flexible": flexible}
    judged = judge_math({"output": reference}, reply)
    assert judged == {name: score for name, score in expected.items() if score is not None}


def test_same_number():
    assert same_number(1 / 3, 0.33333333) and same_number(0.0, -0.0) and same_number(1e12, 1e12 + 1)
    assert not same_number(0.3333, 1 / 3) and not same_number(100, 101)
    assert not same_number(None, None) and not same_number(0, None) and not same_number(None, 0)


CODE = "def f(x):\n    return x\n"


@pytest.mark.parametrize(
    "text, code",
    [
        (CODE, CODE),
        (f"Here it is:\n```python\n{CODE}```\nIt returns `x`.", CODE),
        (f"```py\n{CODE}```", CODE),
        (f"```\n{CODE}```", CODE),
        (f"```Python3 \n{CODE}", CODE),
        (f"```python\n{CODE}```\n```python\nf(1)\n```", CODE),
        (f"```bash\npip install it\n```\nThen\n```python\n{CODE}```", CODE),
        (f"1. So:\n   ```python\n   def f(x):\n       return x\n   ```\n{CODE}", CODE),
        ("```js\nlet x = 1\n```", "```js\nlet x = 1\n```"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_code_of(text, code):
    assert code_of(text) == code


def squares(reply):
    """Whether the program in a reply defines `area` rightly. It is one of ours: no sandbox."""
    names = {}
    try:
        exec(compile(code_of(reply), "<reply>", "exec"), names)
    except SyntaxError:
        return False
    return "area" in names and names["area"](3) == 9


@pytest.mark.parametrize("reply", RIGHT_PROGRAMS)
def test_right_programs_are_found(reply):
    assert squares(reply) and is_python(reply)


@pytest.mark.parametrize("reply", WRONG_PROGRAMS)
def test_wrong_programs_are_none(reply):
    assert not squares(reply)


def test_enough_is_labelled_both_ways():
    refused = [row for row in MATH if False in row[2:]]
    assert len(RIGHT_PROGRAMS) + len(WRONG_PROGRAMS) + len(MATH) >= 100
    assert len(WRONG_PROGRAMS) >= 20 and len(refused) >= 15 and len(NO_NUMBERS) >= 30


@given(
    st.sampled_from(["", "Here it is:\n", "Sure! It's easy.\n\n"]),
    st.sampled_from(["```", "````", "~~~", "~~~~"]),
    st.sampled_from(["", "py", "python", "Python3", " python "]),
    st.sampled_from([AREA, FENCES_INSIDE, "area = lambda a: a * a\n"]),
    st.sampled_from(["", "\n", "\nIt squares it.", "\n```\nprint(9)\n```"]),
    st.booleans(),
)
def test_a_pair_of_fences_gives_what_it_holds(before, fence, language, program, after, indented):
    block = f"{fence}{language}\n{program}{fence}"
    block = textwrap.indent(block, "  ") if indented else block
    assert squares(before + block + after)


@given(st.text("`~ \n'\"x1#()", max_size=60))
def test_no_text_breaks_the_judge_of_programs(text):
    assert is_python(text) in (True, False)
    # Nothing is lost of what has no fence.
    assert code_of(text) == text or "`" in text or "~~~" in text


HOSTILE = [" ", "\t", "`", "~", "```\n", "```a\n", "```python\n", "```x()```", "````\n```\n"]
HOSTILE += ['"""\n```\n', "'''\n```\n\"\"\"\n```\n", "```\n(\n", "x()\n```\n", "```\nx\n```\n("]
HOSTILE += ["1", ",", "1,", "1,000", "1/", "1 1/", "-", "-1", "$", ".", "^", "1e", "10^", "1 "]
HOSTILE += ["a-", "\\frac{", "\\text{1", "½", "²", "今", "\u0301"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_replies_are_read_a_few_times_only(piece, monkeypatch):
    """Were a pattern or a loop to try each start with each end, 60 KB would take minutes."""
    lengths, parse = [], ast.parse
    monkeypatch.setattr(ast, "parse", lambda text: lengths.append(len(text)) or parse(text))
    for before, after in (("", ""), ("#### ", "x"), ("```python\n", "\n```"), ("1", "\n")):
        text = before + piece * (60_000 // len(piece)) + after
        lengths.clear()
        is_python(text)
        assert sum(lengths) <= 10 * len(text)
        strict_number(text)
        flexible_number(text)
        words_of(text)


@pytest.mark.parametrize(
    "text, parses",
    [
        (CODE, True),
        (f"Sure!\n```python\n{CODE}```", True),
        ("print('\\d', 1 is 1)", True),
        ("Hello", True),
        ("Sure, here it is: f", False),
        ("def f(x)\n    return x", False),
        ("  x = 1\ny = 2", False),
        ("", False),
        ("  \n", False),
        ("# nothing but a comment", False),
        ("```python\n```", False),
        ("x = 1\0", False),
        ("x = '\ud800'", False),
        ("(" * 10_000 + ")" * 10_000, False),
        ("-" * 100_000 + "1", False),
    ],
)
@pytest.mark.filterwarnings("error")
def test_is_python(text, parses):
    assert is_python(text) == parses
