"""What a training says of itself while it runs: a bar, and lines in words in the place of the Trainer's dicts."""

import logging

from transformers import ProgressCallback, Trainer

# Said where two checkpoints are less than a second apart: their steps then order them, which is right for every run.
logging.getLogger("transformers.trainer_utils").addFilter(lambda r: not str(r.msg).startswith("mtime may not be"))


class Progress(ProgressCallback):
    """The Trainer's bar, with a line for each entry of the log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step} of {state.max_steps}  {in_words(logs or {})}")


def talk_plainly(trainer: Trainer) -> None:
    """Takes Progress in the place of the Trainer's own, unless the bar is switched off."""
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(Progress)


def in_words(logs: dict) -> str:
    if "train_runtime" in logs:
        return f"trained in {logs['train_runtime'] / 60:.1f} minutes"
    measured = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
    told = measured or {key: logs[key] for key in ("loss", "learning_rate") if key in logs}
    text = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in told.items())
    return f"validation: {text}" if measured else text


def number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
