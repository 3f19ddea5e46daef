"""Which code makes the records, and what ships with it."""

import hashlib
from pathlib import Path

# What makes a record, from the ground up: covered_call_candidates.py is made of these, in this order.
MODULES = (
    "schema", "columns", "options", "number_texts", "context_lines", "prompts", "csv_rows", "strays", "csv_blocks",
    "columnar", "reading", "pricing", "series", "context_ohlcv", "context", "score_terms", "explanations", "spots",
    "settlement", "chains", "vols", "outcomes", "analogues", "opinions", "splits", "terms", "spool", "decisions",
    "preferences", "records", "builder",
)  # fmt: skip


def hash_of_modules(folder: Path) -> str:
    """SHA-256 of the modules in a checkout's covered_call/candidates."""
    texts = (folder.joinpath(f"{name}.py").read_bytes().replace(b"\r\n", b"\n") for name in MODULES)
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


# Read once, at import: the cache key must name the code that is running, not a later edit of it.
CODE_HASH = hash_of_modules(Path(__file__).parent)
PACKAGE = Path(__file__).parents[1]
# Where data/, configs/ and dataset_card.md are: inside an installed package, beside it in a checkout.
HOME = PACKAGE if (PACKAGE / "configs").is_dir() else PACKAGE.parent


def check_current(base_path: str) -> None:
    """Of the generated script, which has one of its own: the package is never older than itself."""
