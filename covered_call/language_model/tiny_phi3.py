"""A Phi-3 small enough for a laptop's CPU: the real architecture and chat format, a vocabulary learnt from the data.

It stands in for Phi-3-mini where there is no GPU, so that the whole quantised path can be run and tested. It is
good for nothing but these prompts.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Phi3Config, Phi3ForCausalLM, PretrainedConfig, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from covered_call import atomic
from covered_call.language_model.training_log import talk_plainly

logger = logging.getLogger(__name__)

BATCH = 32  # records of a step of the base's training
MADE = "tiny_base"  # in the configuration of a base that was made here: how

# Special, but with no role in the tokenizer, as Phi-3 has them: all_special_ids does not know them. Phi-3's swallow
# the line break that follows, too; two layers learn better where it stays.
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
# As in Phi-3-mini-4k-instruct: a line a role, <|end|> after each message, the end of text after the last.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts that reads numbers digit by digit and breaks no text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|pad|>", *ROLES],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def random_phi3(tokenizer: PreTrainedTokenizerFast, seed: int) -> Phi3ForCausalLM:
    """A Phi-3 of two layers with random weights; its linear layers divide into the 64-blocks of 4-bit quantisation."""
    set_seed(seed)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        original_max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Phi3ForCausalLM(config)


def made_tiny(config: PretrainedConfig) -> dict[str, int] | None:
    """For how many ``steps`` a tiny Phi-3 was trained on the answers, from the random weights of ``seed``; None of any
    other model."""
    return getattr(config, MADE, None)


def tiny_base_path(folder: str, train: Dataset, steps: int, seed: int) -> str:
    """Where the tiny Phi-3 of these arguments and this file stands or will stand: a stale one is never reused.

    Args:
        folder: start of the path.
        train: conversational ``prompt`` and ``completion`` columns.
    """
    content = json.dumps([list(train), steps, seed]) + Path(__file__).read_text(encoding="utf-8")
    return f"{folder}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def build_tiny_base(path: str, train: Dataset, steps: int, seed: int) -> None:
    """Saves a tiny Phi-3 whose weights were all trained for ``steps``, in full precision, on these answers.

    LoRA over a frozen random base learns next to nothing, so the base must be able to read the prompts first. While
    another process builds the same one, this one waits for it.

    Args:
        path: where to save it, as tiny_base_path says.
        train: conversational ``prompt`` and ``completion`` columns.
    """
    told = False
    while not os.path.isdir(path):
        try:
            with atomic.locked(path):
                if not os.path.isdir(path):
                    train_tiny_base(path, train, steps, seed)
        except atomic.FolderBusy as busy:
            if not told:
                logger.warning("Waiting for another run to build the tiny Phi-3: %s", busy)
            told = True
            time.sleep(1)


def train_tiny_base(path: str, train: Dataset, steps: int, seed: int) -> None:
    rows = list(train)
    logger.warning("Building a tiny Phi-3 in %s: %d steps on %d records, once.", path, steps, len(rows))
    tokenizer = train_tokenizer(message["content"] for row in rows for message in row["prompt"] + row["completion"])
    unfinished = atomic.unfinished(path)
    try:
        model = random_phi3(tokenizer, seed)
        setattr(model.config, MADE, {"steps": steps, "seed": seed})  # a result must not call it untuned
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(unfinished),
                max_steps=steps,
                per_device_train_batch_size=BATCH,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=steps // 10,
                max_length=None,
                completion_only_loss=True,
                use_cpu=True,
                bf16=False,
                activation_checkpointing=False,
                seed=seed,
                logging_steps=50,
                save_strategy="no",
                report_to="none",
            ),
            # No more than are read, for TRL tokenises each, one by one.
            train_dataset=train.shuffle(seed=seed).select(range(min(len(train), steps * BATCH))),
            processing_class=tokenizer,
        )
        talk_plainly(trainer)
        trainer.train()
        trainer.save_model(str(unfinished / "model"))
        os.rename(unfinished / "model", path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
