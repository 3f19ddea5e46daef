"""Fine-tunes a language model to answer as the teacher did: `python train_sft.py --config ranking`."""

import sys

from covered_call.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
