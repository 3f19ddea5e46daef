"""The verb agent kill: a file KILL stops every order of the agents of a configuration, running or not.

It stands in the state folder, where each of them looks before an order, wherever its log is, and in the folder of each
mode's log beside it.
"""

import argparse
import os
from pathlib import Path

from covered_call import atomic
from covered_call.candidates.data_options import Help
from covered_call.command_line import plain_errors, start_logging
from covered_call.runtime.agent_config import ConfigError, read_config

KILL = "KILL"
LOGS = ("shadow", "paper", "testnet")  # folders of the state folder; a replay orders nothing


def killed(*folders: str | os.PathLike) -> bool:
    return any((Path(folder) / KILL).exists() for folder in folders)


def main(arguments: list[str]) -> None:
    args = parse_arguments(arguments)
    start_logging()
    with plain_errors(args, ConfigError):
        config = read_config(args.config)
        print("\n".join(lift(config.state_dir) if args.lift else kill(config.state_dir)))


def folders_of(state_dir: str) -> list[Path]:
    return [Path(state_dir), *(found for name in LOGS if (found := Path(state_dir) / name).is_dir())]


def kill(state_dir: str) -> list[str]:
    """Throws the switch, first where every agent looks; returns what is to be said."""
    Path(state_dir).mkdir(parents=True, exist_ok=True)
    said = []
    for folder in folders_of(state_dir):
        was = killed(folder)
        atomic.write(
            folder / KILL, "Written by covered-call agent kill: nothing is ordered while this file is here.\n"
        )
        said.append(f"{folder / KILL}: {'was there' if was else 'written'}")
    return [*said, "Nothing is ordered from now on; open positions stay. covered-call agent kill --lift ends that."]


def lift(state_dir: str) -> list[str]:
    """Takes the switch back, last where every agent looks; returns what is to be said."""
    found = [folder / KILL for folder in reversed(folders_of(state_dir)) if killed(folder)]
    for path in found:
        path.unlink()
    removed = [f"{path}: removed" for path in found]
    return [*removed, "Orders may go again."] if found else [f"{state_dir}: no {KILL} was there."]


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="covered-call agent kill", description="Stops every order of the agents of a configuration at once, "
        "those that run and those that start. Positions stay as they are.", epilog="example:\n"
        "  covered-call agent kill --config agent.yaml", formatter_class=Help, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--config", metavar="YAML", required=True, help="the agent's; its state_dir is what counts")
    parser.add_argument("--lift", action="store_true", help="take it back: orders may go again")
    return parser.parse_args(arguments)
