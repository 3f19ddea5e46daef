"""A tuned model to share: what training wrote and nothing else, without the paths of this machine, and its card."""

import fnmatch
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from covered_call import __version__, atomic
from covered_call.candidates.options import PATHS
from covered_call.evaluation import metrics
from covered_call.evaluation.money import ALL
from covered_call.evaluation.report import markdown_table
from covered_call.evaluation.rows import HODL, MODEL, TEACHER
from covered_call.language_model.manifest import CALIBRATION, MANIFEST, RECIPE, PolicyError, hash_of, read_manifest
from covered_call.publishing.dataset import CARD, fill, load_card, workplace
from covered_call.publishing.hub import PublishError, check_no_secrets, private_folders, push

FIGURES = "metrics.json"
# What a training says of itself. The rest of what is shared are the files whose hashes its manifest keeps.
SAID = (CARD, MANIFEST, RECIPE, CALIBRATION, "training.png")


def as_json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def as_yaml(value) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


JSON, YAML = (json.loads, as_json), (yaml.safe_load, as_yaml)
STRUCTURED = {RECIPE: YAML} | dict.fromkeys(
    (FIGURES, CALIBRATION, "adapter_config.json", "config.json", "generation_config.json", "tokenizer_config.json"),
    JSON,
)
REQUIREMENTS, SCRIPT = "requirements.txt", "covered_call_candidates.py"
WEIGHTS = ("adapter_*", "model*.safetensors*")  # of an earlier push: those of another kind would be loaded
REPORT = Path("report") / FIGURES
REPORTED = ["accuracy", "trade_rate", "coverage", "mean_percent", "percent_minus_teacher", "mean_pnl"]


def push_model(
    folder: str | os.PathLike,
    repo: str | None,
    private: bool = True,
    revision: str | None = None,
    data_repo: str | None = None,
    report: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    to: str | None = None,
) -> None:
    """Shares a finished fine-tune with its model card in one commit; what training did not write stays here.

    Args:
        folder: as training saved it; it is not changed.
        to: a folder to write the same files into, in the place of a repo.
        data_repo: the dataset on the Hub that it was tuned on.
        report: a metrics.json of the verb evaluate; default that of ``report/``, if it is of this model.

    Raises:
        PublishError: if the run has not finished, a file is not as it was saved, no regular one, or holds a token, the
            report is of another model, ``to`` is there already, or the Hub refuses.
    """
    folder = Path(folder)
    manifest = read_finished(folder)
    names, left_out = files_to_share(folder, {*SAID, *manifest["files"]})
    with tempfile.TemporaryDirectory(prefix="covered_call_card_") as scratch:
        judged, figures = find_report(folder, report)
        card = model_card(folder, manifest, repo, revision, data_repo, figures)
        tree = {name: folder / name for name in names} | ({FIGURES: judged} if judged else {})
        tree |= without_paths(tree, manifest, card, Path(scratch))
        tree[REQUIREMENTS] = write(Path(scratch) / REQUIREMENTS, requirements(manifest))
        print("\n".join(f"{path}  {file.stat().st_size:,} bytes" for path, file in tree.items()))
        if left_out:
            print(f"Not shared, for training did not save it to be loaded: {', '.join(left_out)}")
        if dry_run:
            check_no_secrets(tree, token)
            print(f"\n{tree[CARD].read_text(encoding='utf-8')}")
            return
        if to:
            check_no_secrets(tree, token)
            write_folder(tree, Path(to))
            return
        push(tree, str(repo), "model", private, revision, lambda path: matches(path, WEIGHTS), token)


def write_folder(tree: dict[str, Path], target: Path) -> None:
    """The files as a folder of their own, which must not be there yet."""
    with workplace(target) as scratch:
        made = scratch / "new"
        made.mkdir()
        for name, file in tree.items():
            shutil.copyfile(file, made / name)
        check_free(target)
        atomic.replace_folder(made, target)
    print(f"Written to {target}")


def check_free(target: Path) -> None:
    if target.is_symlink() or target.exists():
        raise PublishError(f"{target} is there already, and is not overwritten: give another folder with --to.")


def requirements(manifest: dict) -> str:
    """The libraries that a model was tuned with, as pip reads them, and the code that renders its prompts."""
    script = manifest.get("script")
    made = f", whose {SCRIPT} was made of {script}" if script else ""
    lines = [f"{name}=={version.split('+')[0]}" for name, version in manifest.get("versions", {}).items()]
    said = f"# Prompts of version {manifest['prompt_version']}; shared by covered-call-candidates {__version__}{made}."
    return "\n".join([said, *lines, ""])


def files_to_share(folder: Path, written: set[str]) -> tuple[list[str], list[str]]:
    """The names of the files that training wrote, and of whatever else lies in the folder, which is not read.

    Raises:
        PublishError: if one of the first is a link, or no file at all.
    """
    shared, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name not in written:
            left_out.append(f"{path.name}/" if path.is_dir() else path.name)
        elif path.is_symlink() or not path.is_file():
            kind = "a link" if path.is_symlink() else "no regular file"
            raise PublishError(f"{path} is {kind}: only files that lie in the folder are shared. Put the file there.")
        else:
            shared.append(path.name)
    return shared, left_out


def read_finished(folder: Path) -> dict:
    try:
        return read_manifest(folder)
    except PolicyError as error:
        raise PublishError(str(error)) from error


def without_paths(tree: dict[str, Path], manifest: dict, card: str, scratch: Path) -> dict[str, Path]:
    """Copies of the files that say where things lie on this machine, with names in the place of paths; and the card.

    The manifest's hashes are those of the copies.
    """
    local = local_names(manifest)
    copies = {CARD: write(scratch / CARD, scrub_text(card, local))}
    for name in [name for name in tree if name in STRUCTURED]:
        load, dump = STRUCTURED[name]
        try:
            found = load(tree[name].read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise PublishError(f"{tree[name]} cannot be read ({error}): tune the model again.") from error
        clean = scrubbed(tree[name], found, local)
        if clean != found:
            copies[name] = write(scratch / name, dump(clean))
    files = {name: hash_of(copies[name]) if name in copies else digest for name, digest in manifest["files"].items()}
    clean = scrubbed(tree[MANIFEST], manifest, local) | {"files": files}
    return copies | {MANIFEST: write(scratch / MANIFEST, as_json(clean))}


def local_names(manifest: dict) -> set[str]:
    """What the manifest calls its base, if that is a folder: its revision is a hash then, and not a commit."""
    named = {manifest["base_model"], manifest["recipe"].get("model_name_or_path")}
    return {name for name in named if name} if is_folder_base(manifest) else set()


def is_folder_base(manifest: dict) -> bool:
    return str(manifest["base_revision"]).startswith("sha256:") or os.path.exists(manifest["base_model"])


def scrubbed(path: Path, found, local: set[str]):
    try:
        return scrub(found, local)
    except PublishError as error:
        raise PublishError(
            f"{path}: {error}, with which anybody may write in your name. Revoke it at "
            "https://huggingface.co/settings/tokens, delete it from the file, and run this again."
        ) from error


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def model_card(
    folder: Path,
    manifest: dict,
    repo: str | None,
    revision: str | None,
    data_repo: str | None,
    figures: str,
) -> str:
    """The card that training wrote, with where the model and its data are on the Hub, and its evaluation."""
    card = load_card(ModelCard, folder / CARD)
    data = "The data it was tuned on are not on the Hub."
    if data_repo:
        card.data["datasets"] = [data_repo]
        data = f"It was tuned on [{data_repo}](https://huggingface.co/datasets/{data_repo}), `{manifest['task']}`."
    if manifest["adapter"] and is_folder_base(manifest):
        base = f"`{name_of(manifest['base_model'])}` ({manifest['base_revision']})"
        data += f" Its base, {base}, is a folder on the machine that tuned it, and not shared here."
        print(f"Note: nobody else can load it, for its base, {manifest['base_model']}, is a folder on this machine.")
    at = f', revision="{revision}"' if revision else ""
    use = HOW_TO_DECIDE.format(repo=repo, at=at) if repo else FROM_A_FOLDER
    card.text = fill(card.text, "loading", "Use it", f"{use}\n\n{data}")
    if figures:
        card.text = fill(card.text, "evaluation", "Evaluation", figures)
    return str(card)


HOW_TO_DECIDE = """\
```python
from huggingface_hub import snapshot_download

from covered_call import Policy

policy = Policy.load(snapshot_download("{repo}"{at}))
```"""
FROM_A_FOLDER = """\
```python
from covered_call import Policy

policy = Policy.load(".")  # or where this folder is
```"""


def find_report(folder: Path, given: str | None) -> tuple[Path | None, str]:
    """A metrics.json to go with the model, and its figures for the card; None if report/ has none of this model."""
    path = Path(given or REPORT)
    if not given and not path.is_file():
        return None, ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        of_this_model = found["model"] is not None and Path(found["model"]).resolve() == folder.resolve()
        if of_this_model and found["metrics_version"] == metrics.VERSION:
            return path, describe_report(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(
            f"{path} is no metrics.json of `covered-call evaluate` ({type(error).__name__}: {error})."
        ) from error
    if given:
        raise PublishError(
            f"{path} is of {found['model'] or 'the baselines alone'}, with metrics of version "
            f"{found['metrics_version']}. Run: covered-call evaluate --model {folder}"
        )
    print(f"{path} is not of {folder}: the card is made without it.")
    return None, ""


def describe_report(found: dict) -> str:
    """The verdict, and the model beside the best rule, the teacher and never selling, for each market."""
    parts = [
        f"By `covered-call evaluate` on the {found['split']} split; [95 % intervals]; P&L against HODL, in % of spot "
        "and in USD a unit."
    ]
    parts += ["\n".join([f"{name}:\n", *(f"- {one}" for one in said)]) for name, said in found["verdict"].items()]
    for group in found["groups"]:
        if group["group"] == ALL:
            since, until = group["from"][:10], group["to"][:10]
            market = f"{group['underlying']}, {group['exit_style']}"
            parts.append(f"**{market}**: {group['decisions']:,} decisions, {since} to {until}")
            rows = {name: group["rows"][name] for name in (MODEL, found["best_rule"], TEACHER, HODL)}
            figures = {who: {name: figure(of[name]) for name in REPORTED} for who, of in rows.items()}
            parts.append(markdown_table(figures, REPORTED))
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in found["notes"])])


def figure(saved: dict) -> metrics.Figure:
    low, high = (float("nan") if saved[end] is None else saved[end] for end in ("low", "high"))
    return metrics.Figure(low, high, saved["interval"])


# ---------------------------------------------------------------------------------------------------------------------
# Scrub: names in the place of paths
PATH_KEYS = ("data_files", "data_dir", "output_dir", "adapter", "resume_from_checkpoint", "chat_template_path", *PATHS)
DROPPED_KEYS = ("logging_dir", "run_name")  # their defaults hold the name of the machine
LOCAL = re.compile(r"/[^/\s]+/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\")  # how a path on a machine begins
REST = r"(?:[/\\][^\s\"'`<>|)\],;]*)?"  # of a path within a text
# Paths of any machine within a text; a URL, a closing tag or a share such as 1/2 is none.
ANYWHERE = r"(?:/(?:home|Users)/[\w.-]+|[A-Za-z]:\\Users\\[\w.-]+|(?<![\w/:.<-])/[\w.@+-]+(?=/[\w.@+-]))"


def name_of(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "."


def is_local(text: str) -> bool:
    return bool(LOCAL.match(text)) or ("/" in text and os.path.exists(text))


def scrub(value, local: set[str], key: str = ""):
    """The same value of JSON or YAML, with the names of files and folders in the place of their paths.

    Args:
        local: texts that are known to be paths.

    Raises:
        PublishError: if it holds a hub_token.
    """
    if key == "hub_token" and value:
        raise PublishError("it holds a hub_token")
    if isinstance(value, dict):
        return {name: scrub(one, local, name) for name, one in value.items() if name not in DROPPED_KEYS}
    if isinstance(value, list):
        return [scrub(one, local, key) for one in value]
    if not isinstance(value, str):
        return value
    return name_of(value) if key in PATH_KEYS or value in local or is_local(value) else scrub_text(value, local)


def scrub_text(text: str, local: set[str]) -> str:
    for path in sorted(local, key=len, reverse=True):
        text = text.replace(path, name_of(path))
    here = "|".join(map(re.escape, private_folders()))
    return re.sub(rf"(?:{here}|{ANYWHERE})(?![\w.-]){REST}", lambda found: name_of(found[0]), text)
