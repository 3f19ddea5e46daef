"""How many questions a model answers to the letter: it writes each answer itself, by the likeliest next token."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from covered_call import atomic
from covered_call.candidates.context_lines import wilson
from covered_call.candidates.schema import CandidatesError, shown
from covered_call.tables import align

FILE = "questions.json"
BATCH = 16  # prompts that are written on together
ALL = "all"


class Question(NamedTuple):
    """A prompt with its answer, and the template it was made by; "" if its file does not say."""

    prompt: list[dict]
    answer: str
    template: str


class Matched(NamedTuple):
    """Of the questions of a template: how many there are, and how many were met to the letter.

    ``commonest`` is how many the commonest of their answers would meet.
    """

    template: str
    questions: int
    met: int
    commonest: int

    @property
    def share(self) -> float:
        return self.met / self.questions

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of Wilson's (1927): it holds near 0 and 1, too."""
        return wilson(self.met, self.questions)


def read_questions(path: str) -> list[Question]:
    """The lines of a JSONL of {"messages": [...]}, the answer last.

    Raises:
        CandidatesError: naming file, line and value, if there are none, or one is no such line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CandidatesError(f"questions={path!r} cannot be read: {error}. Give a JSONL of questions.") from error
    found = [question_in(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise CandidatesError(f"questions={path!r} holds no questions: python data/make_formulas.py makes some.")
    return found


def question_in(path: str, number: int, line: str) -> Question:
    try:
        record = json.loads(line)
        *prompt, answer = [{"role": one["role"], "content": one["content"].strip()} for one in record["messages"]]
        if prompt and answer["role"] == "assistant" and prompt[-1]["role"] == "user" and answer["content"]:
            return Question(prompt, answer["content"], str(record.get("template") or ""))
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise CandidatesError(
        f'{path}, line {number}: {shown(line)}: each line is {{"messages": [...]}}, a question of the user and then '
        "the assistant's answer. Correct it."
    )


def write_answers(policy: Any, questions: Sequence[Question]) -> Iterator[str]:
    """What the model of a policy writes to each, from the likeliest token to the next, through the end of its turn.

    What is longer than the longest answer by half is cut: it is wrong already.
    """
    import torch  # only here: a file of questions is read in a moment

    from covered_call.language_model.loading import answer_tokens, chat_ids

    model, tokenizer = policy.model, policy.tokenizer
    prompts = chat_ids(tokenizer, [question.prompt for question in questions], add_generation_prompt=True)
    tokens = answer_tokens(tokenizer, questions[0].prompt, list({one.answer: None for one in questions}))
    most, end = math.ceil(1.5 * max(map(len, tokens.values()))), next(iter(tokens.values()))[-1]
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(one)) + one for one in part]).to(model.device)
        seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in part]).to(model.device)
        with torch.inference_mode():
            written = model.generate(
                input_ids=ids, attention_mask=seen, max_new_tokens=most, do_sample=False, eos_token_id=end,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        for row in written[:, width:].tolist():
            own = row[: row.index(end)] if end in row else row
            yield tokenizer.decode(own, skip_special_tokens=True).strip()


def match(questions: Sequence[Question], written: Sequence[str]) -> list[Matched]:
    """Of each template, and of all in the end."""
    groups: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        groups.setdefault(question.template, []).append(place)
    if len(groups) > 1:
        groups[ALL] = list(range(len(questions)))
    else:
        groups = {ALL: list(range(len(questions)))}
    return [
        Matched(
            template,
            len(places),
            sum(written[place] == questions[place].answer for place in places),
            Counter(questions[place].answer for place in places).most_common(1)[0][1],
        )
        for template, places in groups.items()
    ]


def ask_all(policy: Any, path: str, folder: Path) -> None:
    """Asks the questions of a file, prints how many were met, and saves that with every answer."""
    questions = read_questions(path)
    print(f"The model answers {len(questions):,} questions ...", flush=True)
    written = list(write_answers(policy, questions))
    found = match(questions, written)
    print(lay_out(found))
    report = {
        "questions": path,
        "exact_match": [{**one._asdict(), "share": one.share, "interval": one.interval} for one in found],
        "answers": [
            {**one._asdict(), "prompt": one.prompt[-1]["content"], "written": its}
            for one, its in zip(questions, written, strict=True)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / FILE, json.dumps(report, indent=2))
    print(f"\nSaved in {folder / FILE}, with every answer.")


def lay_out(found: list[Matched]) -> str:
    head = ["template", "questions", "exact match", "95 % interval", "the commonest answer"]
    rows = [
        [
            one.template, f"{one.questions:,}", f"{one.share:.1%}",
            "{:.1%} to {:.1%}".format(*one.interval), f"{one.commonest / one.questions:.1%}",
        ]
        for one in found
    ]  # fmt: skip
    return "\n" + align([head, *rows], range(1, 5))
