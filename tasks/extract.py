"""What a reply says, found in its text: the number that it ends on, the program that it gives."""

import ast
import functools
import math
import re
import textwrap
import unicodedata
import warnings


def _compatible(match: re.Match) -> str:
    """The same in plain characters: "½" as "1⁄2", "³" as "3"."""
    return unicodedata.normalize("NFKC", match[0])


_SCALES = {
    "e2": "hundred",
    "e3": "thousand",
    "e4": "[万萬]",
    "e6": "million",
    "e8": "[亿億]",
    "e9": "billion",
    "e12": "trillion",
}
# Spellings of numbers, LaTeX's among them, and the plain ones; in the order of replacing.
_PLAIN = [
    (re.compile(spelling, re.I), plain)
    for spelling, plain in (
        (r"\{,\}|(?<=\d)(?:\\,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", ","),
        (r"\\!|\\(?=[%$])", ""),
        (r"\^ ?\{?\\circ\}?", "°"),
        ("(?=[⁰¹²³⁴-⁹⁻])(?<![⁰¹²³⁴-⁹⁻])", "^"),
        (r"(?<=\d)(?=[¼-¾⅐-⅞]|\\[dtc]?frac)", " "),
        ("[⁰¹²³⁴-⁹⁻¼-¾⅐-⅞]", _compatible),
        (r"⁄|(?<=\d) / (?=\d)", "/"),
        (r"\\[dtc]?frac ?\{ ?(-?[\d.,]+) ?\} ?\{ ?([\d.,]+) ?\}(?!\d)", r"\1/\2"),
        (r"\\[dtc]?frac(\d)(\d)(?!\d)", r"\1/\2"),
        # Twice, since one may hold another.
        *[(r"\\(?:boxed|fbox|mbox|text(?:bf|rm)?|math(?:bf|rm)) ?\{([^{}]*)\}", r" \1 ")] * 2,
        (r"(?<=\d) ?(?:[*×·x]|\\times|\\cdot) ?10 ?(?:\^|\*\*) ?\{?([-−+]?\d+)\}?", r"e\1"),
        (r"(?<![\w.,^])10(?:\^|\*\*)\{?([-−+]?\d+)\}?", r"1e\1"),
        (r"(?<=\de)\+(?=\d)", ""),
        *((rf"(?<=\d)[ -]?(?:{name})(?![a-z])", zeros) for zeros, name in _SCALES.items()),
    )
]

# Letters of scripts with spaces, but π: a number ends before a Chinese character.
_LETTER, _MONEY = "A-Za-z\u00c0-\u024f\u0370-\u03bf\u03c1-\u052f", "$£€¥￥₹"
# All that hangs together from a digit on: "3-4", "1/2/2020", "12:30", "5km/h" and "1 1/2" too.
# A minus is no sign after a word, a number or a bracket: "covid-19", "(a)-2".
_WRITTEN = re.compile(
    rf"(?<![{_LETTER}\d_^\\/{{√])(?<!\w\.)(?<!\^[-−])"
    rf"(?:(?<![\w)\]}}])[-−])?(?:[{_MONEY}]{{1,2}}[-−]?)?(?:(?<!\.)\.)?\d"
    rf"(?:[{_LETTER}\d_^%°¢√{_MONEY}]|[.,:'](?=\d)|[-−–—](?=[\d{_MONEY}])|[-/](?=[\w{_MONEY}])"
    r"|\\(?=[a-z]{2})|(?<=\d) (?=\d+/\d))*"
)
_DIGITS = r"((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
# Not the letters of an ordinal, of a variable or of a thousand: "3rd", "2x", "5k".
_UNIT = (
    rf"(?:[{_MONEY}]{{0,2}}|[%¢]|°[CF]?)"
    rf"(?:-?(?:[gmslhdtLVWAJNCF]|(?!(?:st|nd|rd|th|bn)(?![{_LETTER}]))[{_LETTER}]{{2,}})"
    rf"(?:(?<=m)\^?[23])?(?:[-/][{_LETTER}]+)*|/[{_LETTER}]{{2,}})?"
)
_NUMBER = re.compile(
    rf"([-−{_MONEY}]*)(?:(?:(\d+) )?{_DIGITS}/{_DIGITS}|{_DIGITS}(?:[eE]([-−]?\d+))?){_UNIT}"
)
# After a number that is the beginning of more: "2 + x", "2 / 3", "2π", "2 and a half".
_GOES_ON = re.compile(
    r" ?(?:[+×÷·^√π]|[-−*/xX] ?(?:\d|[b-hj-zB-HJ-Z](?![A-Za-z]))|(?:pi|[nxyz])\b"
    r"|and (?:a|one) (?:half|third|quarter)\b)"
)


def _written_numbers(text: str) -> list[re.Match]:
    """All that begins like a number, as far as it hangs together, in the plain spelling."""
    for spelling, plain in _PLAIN:
        text = spelling.sub(plain, text)
    return list(_WRITTEN.finditer(text))


def _value(written: re.Match) -> float | None:
    """The number, or None where that is not exactly one."""
    number = _NUMBER.fullmatch(written[0])
    if not number or _GOES_ON.match(written.string, written.end()):
        return None
    parts = (part.replace(",", "").replace("−", "-") for part in number.groups(""))
    sign, whole, top, bottom, plain, power = parts
    if plain:
        value = float(f"{plain}e{power or 0}")
    elif float(bottom) == 0 or whole and float(top) >= float(bottom):
        return None
    else:
        value = float(whole or 0) + float(top) / float(bottom)
    if not math.isfinite(value):
        return None
    return -value if "-" in sign else value


def strict_number(text: str) -> float | None:
    """The number that the line after the last `####` begins with, as GSM8K wants it, or None.

    It is read whole or not at all: with its sign, commas between thousands, decimals, exponent
    (1e3, 2 × 10^5, 5 million) or fraction (1/2, 1 1/2, \\frac{1}{2}). A currency, a percent sign,
    a unit, bold type, a box or a final dot do not count. Ranges, dates, times and terms are no
    numbers, and a line with two different numbers has none.
    """
    _, mark, after = text.rpartition("####")
    written = _written_numbers(after.lstrip().partition("\n")[0])
    if not mark or not written:
        return None
    before = written[0].string[: written[0].start()]
    if before.strip(" \t*_`'\"([:=+\\" + _MONEY):
        return None
    values = set(map(_value, written))
    return values.pop() if len(values) == 1 else None


def flexible_number(text: str) -> float | None:
    """The last number anywhere in the text, or None; what is no number is passed over.

    Numbers are read as `strict_number` reads them.
    """
    values = map(_value, reversed(_written_numbers(text)))
    return next((value for value in values if value is not None), None)


def same_number(a: float | None, b: float | None) -> bool:
    """Whether both are there and equal up to a millionth of the larger."""
    return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)


# A fence begins its line; one that opens Python may also end it.
_FENCE = re.compile(r"(^[ \t]*|(?<!`)(?=`{3,}(?:python|py)\d*[ \t]*$))(`{3,}|~{3,})", re.M | re.I)
# For "return 1```" and "Here: ```f()```". Tried last: a program may hold "```" in a string.
_FENCE_ANYWHERE = re.compile("()(`{3}|~{3})[`~]*")
_PYTHON = re.compile(r"[ \t]*\{?\.?i?(?:python|py)[\d.]*\}?(?![\w+#-])", re.I)
# Behind a fence that cannot close: a word without a space, Python, or a word that fills the line.
_OPENS = re.compile(rf"[\w{{]|{_PYTHON.pattern}|[ \t]+[a-z][\w.+#-]*[ \t]*(?:\n|\Z)", re.I)
# What may follow the language: "area.py", "title=area.py".
_INFORMATION = re.compile(r"(?:[\w-]+=)?[A-Za-z_][\w.:/+#-]*")
_CODE_SPAN = re.compile(r"\s*(`{1,2})([^`]+)\1\s*")


@functools.lru_cache(maxsize=16)
def _statements(text: str) -> list[ast.stmt]:
    """The statements of a program; none where it does not parse. The same is asked in a row."""
    if not text.strip():
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _acts(text: str) -> bool:
    """Whether a text is Python and no prose: "Done" and "Note: it" parse, but do nothing."""
    return any(
        not isinstance(statement, (ast.Expr, ast.AnnAssign))
        or any(isinstance(node, ast.Call) for node in ast.walk(statement))
        for statement in _statements(text)
    )


def _in_block(indent: str, content: str) -> tuple[str | None, bool]:
    """(the program in what follows an opening fence, whether that is called Python).

    It may begin on the line of the fence. None where the fence names another language.
    """
    tag = _PYTHON.match(content)
    first, _, body = content[tag.end() if tag else 0 :].partition("\n")
    first = first.strip()
    if first and not (body.strip() and _INFORMATION.fullmatch(first)):
        whole = textwrap.dedent(f"{indent}{first}\n{body}") if body.strip() else first
        if _statements(whole):
            return whole, tag is not None
    return (textwrap.dedent(body) if tag or not first else None), tag is not None


def _block_end(fences: list[tuple[str, str, str]], start: int) -> tuple[int, bool]:
    """(the fence that ends the block that `start` opens, whether by closing it).

    None shorter or of other characters, nor one in a string of three quotes that ends later on.
    """
    _, mark, inside = fences[start]
    first, odd = None, (0, 0)
    for i in range(start + 1, len(fences)):
        odd = odd[0] ^ inside.count('"""') & 1, odd[1] ^ inside.count("'''") & 1
        _, other, inside = fences[i]
        if other.startswith(mark):
            end = i, not _OPENS.match(inside)
            if odd == (0, 0):
                return end
            first = first or end
    return first or (len(fences), False)


def _program(text: str, fence: re.Pattern) -> str:
    """The program in a reply with such fences, as `code_of` wants it."""
    before, *rest = fence.split(text)
    fences = list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))
    unfenced, fenced, i = [], [], 0
    while i < len(fences):
        indent, _, after = fences[i]
        end, closed = _block_end(fences, i)
        content = after + "".join(map("".join, fences[i + 1 : end]))
        program, is_named = _in_block(indent, content)
        acts = program is not None and _acts(program)
        if not (closed and acts) and not _OPENS.match(after) and _acts(before):
            # No pair with the next one: it closes the program before it.
            return before
        if acts or is_named and program.strip():
            return program
        if program is not None:
            fenced.append(program)
        unfenced.append(before)
        before = fences[end][2] if closed else ""
        i = end + closed
    return next(filter(_acts, [*unfenced, before]), fenced[0] if fenced else text)


def code_of(text: str) -> str:
    """The program in a reply: its first block fenced as Python, or as nothing and Python indeed.

    Fences are pairs of ``` or ~~~. What is no pair is text, but for Python that is opened and not
    closed, which goes to the end, and Python that is closed and not opened. The program may begin
    on the line of its fence. Where there is none of these: Python outside of the blocks, else the
    first block fenced as nothing, else all of the reply.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if span := _CODE_SPAN.fullmatch(text):
        return span[2]
    if _statements(text):
        # Fences that it may hold are in its strings.
        return text
    program = _program(text, _FENCE)
    if not _statements(program):
        other = _program(text, _FENCE_ANYWHERE)
        return other if _statements(other) else program
    return program


def is_python(text: str) -> bool:
    """Whether the program in a reply parses and is more than comments. A lone word is a program."""
    return bool(_statements(code_of(text)))
