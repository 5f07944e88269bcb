"""The words after `fabric deploy`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fabric.config import as_yaml, override, parse_config, read_config
from fabric.core.errors import ConfigError

DEPLOY_HELP = """\
Brings a running Ray cluster to what CONFIG says. It shows what changes, waits until all of it is
there, and does nothing where nothing differs. `replicas` changes in place; other changes replace
one replica after the other, each by a new one that is ready before the old one stops, so that no
request fails. A new replica needs room beside the old one: on GPUs, a free one.

Runs on a node of the cluster, in the environment of `fabric environment`.

examples:
  fabric deploy deployments/single.yaml
  fabric deploy deployments/single.yaml --dry-run
  ray exec cluster.yaml 'fabric deploy deployments/tensor_parallel.yaml'
  fabric deploy deployments/single.yaml --serve-config > serve.yaml && serve deploy serve.yaml"""


def deploy_parser() -> argparse.ArgumentParser:
    """Of `fabric deploy`."""
    parser = argparse.ArgumentParser(
        prog="fabric deploy",
        description=DEPLOY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of settings")
    parser.add_argument("--address", default="auto", help="of the cluster (default: this node's)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    parser.add_argument(
        "--serve-config",
        action="store_true",
        help="only print what `serve deploy` takes, API keys included",
    )
    return parser


def deploy_main(words: Sequence[str], api_keys: Sequence[str]) -> int:
    """`api_keys`: beside those of the file."""
    arguments = deploy_parser().parse_args(words)
    from fabric.cluster.deploy import deploy, serve_config

    try:
        data = read_config(arguments.config)
        config = parse_config(override(data, {"server.api_keys": api_keys} if api_keys else {}))
    except ConfigError as error:
        raise ConfigError(f"{arguments.config}: {error}") from None
    if arguments.serve_config:
        print(as_yaml(serve_config(config)), end="")
        return 0
    return deploy(config, address=arguments.address, dry_run=arguments.dry_run, say=_say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
