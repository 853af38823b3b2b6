"""Tasks whose answer is one of a closed set: classification."""

from tasks.task import Judge, Task

# What may be a closed set: so many different outputs, each so short, and each so often on average.
MOST_OPTIONS, MOST_CHARACTERS, LEAST_ROWS = 30, 40, 3
# The score of the likelihood form, which needs no reply: see `evaluation.likelihood`.
LIKELIEST = "likeliest"


def normal(answer: str) -> str:
    """What two answers share that count as the same: case, outer space and a final dot do not."""
    return " ".join(answer.split()).removesuffix(".").rstrip().casefold()


def options_of(outputs: list[str]) -> tuple[str, ...]:
    """The different answers among `outputs`, most frequent first, each in its usual spelling."""
    spellings: dict[str, dict[str, int]] = {}
    for output in outputs:
        of_answer = spellings.setdefault(normal(output), {})
        of_answer[output.strip()] = of_answer.get(output.strip(), 0) + 1
    spellings.pop("", None)
    by_number = sorted(spellings.values(), key=lambda of_answer: -sum(of_answer.values()))
    return tuple(max(of_answer, key=of_answer.get) for of_answer in by_number)


def is_choice(outputs: list[str]) -> bool:
    """Whether `outputs` look like a closed set: few, short and repeated."""
    options = options_of(outputs)
    return (
        1 < len(options) <= MOST_OPTIONS
        and all(len(option) <= MOST_CHARACTERS for option in options)
        and len(outputs) >= LEAST_ROWS * len(options)
    )


def judge_choice(options: tuple[str, ...]) -> Judge:
    """A reply is right, and whether it is an option at all; nothing of a row whose output is none.

    "Good" is right where "good." is; "Very good" is not.
    """
    known = set(map(normal, options))

    def judge(row: dict, reply: str) -> dict[str, float]:
        if normal(row["output"]) not in known:
            return {}
        said = normal(reply)
        return {"accuracy": said == normal(row["output"]), "is_option": said in known}

    return judge


def choice_task(name: str, outputs: list[str]) -> Task:
    """The task `name`, whose options are the different `outputs`."""
    options = options_of(outputs)
    tokens = 16 + max((len(option) for option in options), default=0)
    return Task(name, judge_choice(options), "accuracy", max_new_tokens=tokens, options=options)
