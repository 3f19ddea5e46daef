"""The command: `covered-call VERB`, or without installing `python -m covered_call VERB`."""

import importlib
import sys

from covered_call import __version__, command_line

# What each verb is, and where: a verb is imported only when it is asked for.
VERBS = {
    "export": ("candidates.export.main", "chats of a backtest as JSON lines"),
    "verify": ("training.verify.main", "gates to pass before a GPU is paid for, or where a model was moved to"),
    "train": ("tuning.train", "fine-tune a language model to answer as the teacher did"),
    "prefer": ("tuning.prefer", "go on from a fine-tune with pairs of answers: prefer what paid more"),
    "q-scorer": ("value_model.q_scorer.main", "fit boosted trees to what selling each call would have brought"),
    "evaluate": ("evaluation.evaluate.main", "is the tuned model any good? as a copy of the teacher, and in money"),
    "audit": ("evaluation.audit.main", "could the answer be read from the prompt?"),
    "chain": ("runtime.chain.main", "a real option chain as candidates, and what each policy would do now"),
    "agent": ("runtime.agent.main", "decide over time with positions: on a backtest, in shadow, or on paper"),
    "harvest": ("market.harvest.main", "collect option chains from Deribit, and the history of spot and vol"),
    "backtest": ("market.backtest.main", "replay a rule over collected chains, paid at their real quotes"),
    "merge": ("publishing.merge.main", "an adapter merged into its base, to be served by vLLM and others"),
    "publish": ("publishing.publish.main", "share the data sets, or a tuned model, on the Hub or in a folder"),
}
HELP = f"""usage: covered-call VERB [options]

From a covered-call backtest's CSVs to a small language model, and an honest verdict on it.

{"".join(f"  {verb:<10}{what}{chr(10)}" for verb, (_, what) in VERBS.items())}
covered-call VERB --help shows its options, with examples.

  covered-call train --config tiny
  covered-call evaluate --model out/tiny
"""


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--version"]:
        print(f"covered-call {__version__}")
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
    elif arguments[0] not in VERBS:
        sys.exit(f"error: {arguments[0]!r} is no verb: choose one of {', '.join(VERBS)}. See covered-call --help.")
    else:
        command_line.begin()
        module, function = VERBS[arguments[0]][0].rsplit(".", 1)
        sys.exit(getattr(importlib.import_module(f"covered_call.{module}"), function)(arguments[1:]))


if __name__ == "__main__":
    main()
