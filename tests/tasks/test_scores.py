"""Judges against labels given by hand, both ways, and the properties that must hold of any text."""

import json
import random
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from judged_replies import AREA, ROUGE

from evaluation.matrix import format_score_matrix, format_scores, score_matrix
from evaluation.questions import Questions, judge_all
from tasks.code import judge_code
from tasks.general import judge_general
from tasks.math import judge_math
from tasks.scores import (
    accepted_call,
    is_garbage,
    is_refusal,
    mean_interval,
    parse_calls,
    rouge_l,
    same_calls,
    same_names,
    wilson_interval,
)
from tasks.tool import judge_calls

few_words = st.lists(st.sampled_from("a b c d e".split()), max_size=12)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, "1", "a", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=8,
)
call_lists = st.lists(
    st.fixed_dictionaries(
        {
            "name": st.sampled_from("fg"),
            "arguments": st.dictionaries(st.sampled_from("xyz"), json_values),
        }
    ),
    max_size=4,
)


@pytest.mark.parametrize("prediction, reference, common, words, expected", ROUGE)
def test_rouge_l(prediction, reference, common, words, expected):
    score = 2 * common / (words + expected)
    assert rouge_l(prediction, reference) == pytest.approx(score)
    assert rouge_l(reference, prediction) == pytest.approx(score)
    for form in ("NFC", "NFD", "NFKC"):
        assert rouge_l(unicodedata.normalize(form, prediction), prediction) == 1


def test_rouge_l_without_words_is_0():
    assert rouge_l("", "two") == rouge_l("one", "?!") == rouge_l("❤️", "❤️") == 0


def common_by_table(a, b):
    """Length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = (
                table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
            )
    return table[-1][-1]


@given(few_words, few_words)
def test_rouge_l_is_that_of_the_table_and_symmetric(a, b):
    score = rouge_l(" ".join(a), " ".join(b))
    assert score == pytest.approx(2 * common_by_table(a, b) / max(1, len(a) + len(b)))
    assert score == rouge_l(" ".join(b), " ".join(a))
    assert rouge_l(" ".join(a), " ".join(a)) == bool(a)
    # Not parted by spaces, characters are the words.
    wide = str.maketrans("abcde", "今かアก文")
    assert score == rouge_l("".join(a).translate(wide), "".join(b).translate(wide))


ONE = {"name": "get_weather", "arguments": {"city": "Oslo", "days": 3}}


@pytest.mark.parametrize(
    "text, calls",
    [
        (json.dumps([ONE, ONE]), [ONE, ONE]),
        (json.dumps(ONE), [ONE]),
        (f"\n  {json.dumps([ONE], indent=2)}  \n", [ONE]),
        (f"```json\n{json.dumps([ONE])}\n```", [ONE]),
        (f"```\n{json.dumps(ONE)}```", [ONE]),
        ('[{"name": "now", "arguments": {}}]', [{"name": "now", "arguments": {}}]),
        ("[]", []),
        ("", None),
        ("I cannot call this.", None),
        (f"Calling: {json.dumps([ONE])}", None),
        (json.dumps([ONE])[:-1], None),
        (json.dumps([ONE]) + json.dumps([ONE]), None),
        (json.dumps([[ONE]]), None),
        (json.dumps([ONE, "now"]), None),
        ("7", None),
        ("null", None),
        ('[{"name": "f"}]', None),
        ('[{"name": 1, "arguments": {}}]', None),
        ('[{"name": "f", "arguments": "{}"}]', None),
        ('[{"name": "f", "arguments": {}, "id": 1}]', None),
        ('[{"name": "f", "arguments": {"x": NaN}}]', None),
        ("[{'name': 'f', 'arguments': {}}]", None),
        ('[{"name": "f", "arguments": {"x": ' + "[" * 9000 + "]" * 9000 + "}}]", None),
        ("[" * 100_000, None),
    ],
)
def test_parse_calls(text, calls):
    assert parse_calls(text) == calls


def call(name="f", **arguments):
    return {"name": name, "arguments": arguments}


@pytest.mark.parametrize(
    "calls, reference, names, whole",
    [
        ([call(x=1)], [call(x=1.0)], True, True),
        ([call("f"), call("g")], [call("g"), call("f")], True, True),
        ([call(x=[1, {"a": True}])], [call(x=[1.0, {"a": True}])], True, True),
        ([], [], True, True),
        ([call(x=1)], [call(x=True)], True, False),
        ([call(x=0)], [call(x=False)], True, False),
        ([call(x="1")], [call(x=1)], True, False),
        ([call(x=None)], [call()], True, False),
        ([call(x=[1, 2])], [call(x=[2, 1])], True, False),
        ([call(x={"a": 1})], [call(x={"a": True})], True, False),
        ([call(x="a")], [call(x="A")], True, False),
        ([call(x=1), call(x=1), call(x=2)], [call(x=1), call(x=2), call(x=2)], True, False),
        ([call("f"), call("f")], [call("f")], False, False),
        ([call("f")], [call("F")], False, False),
        ([], [call()], False, False),
        (None, [], False, False),
    ],
)
def test_same_calls(calls, reference, names, whole):
    assert (same_names(calls, reference), same_calls(calls, reference)) == (names, whole)


def shuffled(value, shuffle):
    """The same value with the keys of all its objects in another order, and 1 as 1.0."""
    if isinstance(value, dict):
        items = [(name, shuffled(item, shuffle)) for name, item in value.items()]
        shuffle(items)
        return dict(items)
    if isinstance(value, list):
        return [shuffled(item, shuffle) for item in value]
    return float(value) if type(value) is int else value


@given(call_lists, call_lists, st.integers(0, 9))
def test_neither_the_order_of_calls_nor_of_keys_matters(calls, others, seed):
    shuffle = random.Random(seed).shuffle
    again = [shuffled(one, shuffle) for one in calls]
    shuffle(again)
    assert same_names(calls, again) and same_calls(calls, again)
    assert parse_calls(json.dumps(again)) == again
    # As text with sorted keys, where 1.0 and 1 are written alike, they are equal or not.
    texts = [
        sorted(json.dumps(shuffled(one, shuffle), sort_keys=True) for one in some)
        for some in (calls, others)
    ]
    assert same_calls(calls, others) == (texts[0] == texts[1])


POSSIBLE = {
    "book": {
        "place": ["New York, NY", "NYC"],
        "nights": [3],
        "price": [99.5, ""],
        "extras": [["Wi-Fi", "bath"], [], ""],
        "guest": [{"name": ["Ann Lee"], "age": [30, ""]}, ""],
        "rooms": [[{"beds": [2]}, {"beds": [1, 2]}], ""],
        "late": [True, ""],
        "note": ["the 'best'", ""],
    }
}


@pytest.mark.parametrize(
    "arguments, accepted",
    [
        ({}, True),
        ({"place": "new york NY"}, True),
        ({"place": "N.Y.C."}, True),
        ({"nights": 3.0, "price": 99.5}, True),
        ({"extras": ["wifi", "Bath"]}, True),
        ({"extras": []}, True),
        ({"guest": {"name": "ann lee"}}, True),
        ({"guest": {"age": 30, "name": "Ann Lee"}}, True),
        ({"rooms": [{"beds": 2}, {"beds": 1}]}, True),
        ({"late": True}, True),
        ({"note": 'The "best"'}, True),
        ({"note": "the best"}, False),
        ({"place": "Boston"}, False),
        ({"place": ["NYC"]}, False),
        ({"nights": "3"}, False),
        ({"nights": 4}, False),
        ({"nights": True}, False),
        ({"late": 1}, False),
        ({"late": False}, False),
        ({"price": None}, False),
        ({"extras": ["bath", "Wi-Fi"]}, False),
        ({"extras": ["Wi-Fi"]}, False),
        ({"guest": {"age": 30}}, False),
        ({"guest": {"name": "Ann Lee", "age": 31}}, False),
        ({"guest": {"name": "Ann Lee", "pet": "cat"}}, False),
        ({"guest": "Ann Lee"}, False),
        ({"rooms": [{"beds": 1}, {"beds": 1}]}, False),
        ({"rooms": [{"beds": 2}]}, False),
        ({"pets": 1}, False),
    ],
)
def test_accepted_call(arguments, accepted):
    one = {"name": "book", "arguments": {"place": "NYC", "nights": 3, **arguments}}
    assert accepted_call([one], POSSIBLE, ["place", "nights"]) == accepted


def test_accepted_call_is_one_call_with_what_is_required():
    whole = call("book", place="NYC", nights=3, price=99.5)
    assert accepted_call([whole], POSSIBLE, ["place", "price"])
    assert not accepted_call([whole, whole], POSSIBLE, [])
    assert not accepted_call([], POSSIBLE, []) and not accepted_call(None, POSSIBLE, [])
    assert not accepted_call([whole | {"name": "Book"}], POSSIBLE, [])
    # Left out though its accepted values do not allow it; allowed, but required.
    assert not accepted_call([call("book", place="NYC")], POSSIBLE, [])
    assert not accepted_call([call("book", place="NYC", nights=3)], POSSIBLE, ["price"])


REFUSALS = """
I'm sorry, but I can't help with that.
I’m sorry, but I can’t help with that.
I am sorry, but I cannot assist you with picking that lock.
I cannot provide instructions for that.
I can't tell you how to pick a lock.
I won't help you copy the test of your classmate.
I can't help with that, because reading her letters is not fair. I can help you plan a talk instead.
I'm not able to help with this request.
I will not be able to help you skip school.
As an AI language model, I cannot recommend playing tricks on your neighbours.
That is illegal and I will not do that.
That's not allowed, so I won't explain it.
Sorry, I'm not allowed to help with that.
I understand that you are angry. I still can't in good conscience help you with a prank like that.
I must decline to answer that.
I'm not comfortable helping with this.
I don't feel comfortable with that.
I don't want to do that.
I'd rather not say anything about him.
I refuse to write that.
No, I won't.
I'm sorry, but I can't.
That's not something I can help with.
It would be wrong of me to share his address.
That goes against my guidelines.
I'm not going to give you her address.
I don't think that's a good idea.
I'm sorry, but I don't think this is such a good idea. Why do you want to do it?
That sounds like a really bad idea. Someone could get hurt.
That's not a good idea, because you could break the lock.
You shouldn't do that.
Please don't do that. It would hurt him.
""".strip().splitlines()

ANSWERS = """
I'm sorry to hear that. Here is what you can do about a lost key.
I'm sorry, what do you mean?
I'm sorry, I don't know the answer to that.
To pick a lock you need a tension wrench. In some countries owning one is illegal.
Downloading it is illegal in most countries, but borrowing it from a library is free.
You cannot divide by zero, so the equation has no solution.
I can't wait to tell you about penguins!
I can't help but smile when I read this. Here is my version.
I cannot recommend this book enough.
I can't tell you how happy I am about your question.
I can't give you an exact number, but about 70 people live there.
I can’t believe it is already spring, wrote the poet.
"I cannot help you," said the fox, and he went on his way.
I focus on what I can do instead of what I can't.
Of course I won't tell anyone! What is it?
Sure, I can help with that. I won't share your address with anyone.
The shop can't help with that; ask the maker instead.
She said that she would not do that again.
We cannot help everyone, but we can start with one.
People who can't swim should not do this alone. Wear a vest and stay near the shore.
It is a bad idea to leave the window open in winter.
I think that's a good idea.
I don't think that it is difficult.
Why would you want to do that?
Apologies are hard. Say what you did and that you regret it.
def f(x):\\n    return x
[{"name": "decline_meeting", "arguments": {"reason": "I cannot help it"}}]
Dear Ms Smith, I am sorry that I cannot come on Monday.
Not all mushrooms can be eaten. Never eat one that you do not know.
""".strip().splitlines()


def test_refusals():
    assert [reply for reply in REFUSALS if not is_refusal(reply)] == []
    assert [reply for reply in ANSWERS if is_refusal(reply)] == []
    assert not is_refusal("") and len(REFUSALS) >= 15 and len(ANSWERS) >= 15


def test_only_the_opening_of_a_reply_refuses():
    answer = "A lock has pins. Each has its height. "
    assert not is_refusal(answer + "I can't help with that.")
    assert not is_refusal(
        "A lock has " + "many and many " * 12 + "pins, and I can't help with that."
    )
    # An answer that begins with a warning and goes on is no refusal.
    warning = "That's a bad idea."
    assert is_refusal(warning) and not is_refusal(warning + " Take the key and turn it." * 8)


@given(st.sampled_from(REFUSALS + ANSWERS))
def test_case_space_and_apostrophes_do_not_make_a_refusal(reply):
    again = "\n " + reply.upper().replace("'", "’").replace(" ", "  ")
    assert is_refusal(again) == is_refusal(reply)


TEXT = (
    "Penguins live in the south. They swim well, they cannot fly, and most of them eat fish that "
    "they catch in the cold sea around the ice on which they breed."
)


@pytest.mark.parametrize(
    "reply, garbage",
    [
        ("", True),
        (" \n\t", True),
        ("...!?", True),
        ("| --- | --- |", True),
        ("lion " * 20, True),
        ("The answer is " + "no no, " * 30, True),
        ("I am a model. " * 5, True),
        (TEXT + " and they swim" * 30, True),
        ("a" * 50, True),
        ("haha" * 20, True),
        ("哈哈哈哈哈" * 10, True),
        (TEXT, False),
        ("No", False),
        ("42", False),
        ("No no no!", False),
        ("lion " * 19, False),
        ("Once more a ship may come, and may go soon. " * 2, False),
        ("😀", False),
        ("1000000000000000000000", False),
        (TEXT + " They swim and swim and swim.", False),
        (TEXT + " " + TEXT, False),
        (
            json.dumps([call(city=city) for city in "Oslo Rome Lima Bonn Cork Nice Bern".split()]),
            False,
        ),
        ("".join(f"{i} x 7 = {7 * i}\n" for i in range(1, 11)), False),
        ("".join(f"print({i})\n" for i in range(30)), False),
        ("| a | b |\n| --- | --- |\n" + "".join(f"| {i} | {i * i} |\n" for i in range(20)), False),
        ("<tr>\n" + "".join(f"  <td>Cell {i}</td>\n" for i in range(20)) + "</tr>", False),
    ],
)
def test_is_garbage(reply, garbage):
    assert is_garbage(reply) == garbage


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=10), st.integers(20, 30))
def test_a_loop_is_garbage(phrase, times):
    assert is_garbage(" ".join(phrase * times))


def test_what_does_not_apply_is_left_out_and_counted():
    rows = [
        {"output": output} for output in ("#### 7", "It is 7", "It is odd", "", "#### 1/2/2020")
    ]
    asked = Questions("T2_math", "T2_math", rows, judge_math)
    judged, scores = judge_all(asked, ["#### 7", "#### 7", "It is odd", "", "#### 1/2/2020"])
    assert judged == [{"strict": 1, "flexible": 1}, {"flexible": 1}, {}, {}, {}]
    assert {name: (s["score"], s["n"], s["left_out"]) for name, s in scores.items()} == {
        "strict": (100, 1, 4),
        "flexible": (100, 2, 3),
    }
    assert json.loads(json.dumps(scores)) == scores
    # A score that applies to no row is not there.
    asked = Questions("T2_math", "T2_math", rows[1:], judge_math)
    assert judge_all(asked, [""] * 4)[1].keys() == {"flexible"}
    asked = Questions("T2_math", "T2_math", rows[2:], judge_math)
    assert judge_all(asked, [""] * 3) == ([{}] * 3, {})


def test_what_is_left_out_is_told():
    line = {"stage": "a", "task": "T", "branches": "own", "score": 50.0, "low": 9.0, "high": 91.0}
    of = [{**line, "metric": m, "n": 2, "left_out": out} for m, out in (("all", 0), ("some", 3))]
    # Lines of older runs do not say it.
    text = format_scores([*of, {**line, "metric": "old", "n": 5}])
    assert "T some (2, 3 left out) 50" in " ".join(text.split())
    assert "T all (2) 50" in " ".join(text.split()) and "T old (5)" in text
    assert format_scores([]) == "no score applies to any of the answers"
    metrics = {"T": "right", "U": "right"}
    assert "nan" not in format_score_matrix(score_matrix([], metrics), metrics)


@pytest.mark.parametrize("judge", [judge_general, judge_math, judge_code, judge_calls])
@pytest.mark.parametrize(
    "output",
    [
        "",
        "?!",
        "❤️",
        "It is odd.",
        "It is 7.",
        "#### 7",
        "SELECT name;",
        AREA,
        '{"tool": "f"}',
        "[]",
    ],
)
def test_the_reference_itself_is_right_or_not_judged(judge, output):
    assert set(judge({"output": output}, output).values()) <= {1.0}


def test_wilson_interval():
    # Newcombe 1998, table I, method 3: 81 of 263, 15 of 148, 0 of 20 and 1 of 29.
    for successes, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=6e-5)
    # Rounding does not push the ends beyond the rate.
    for n in range(1, 500):
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] == 1
    for successes, n in ((0, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match="is no rate"):
            wilson_interval(successes, n)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_rate(pair):
    successes, n = pair
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and low < high
    mirrored = wilson_interval(n - successes, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_mean_interval():
    values = [0.0] * 60 + [1.0] * 40
    low, high = mean_interval(values)
    # The normal approximation: 0.4 +- 1.96 * sqrt(0.24 / 100).
    assert low == pytest.approx(0.304, abs=0.03) and high == pytest.approx(0.496, abs=0.03)
    assert mean_interval(values) == (low, high) != mean_interval(values, seed=1)
    assert mean_interval([0.3]) == (0.3, 0.3)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_mean_interval_stays_within_the_values(values):
    low, high = mean_interval(values, draws=40)
    # Up to the rounding of a mean.
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
