"""Publish a trained model on the Hugging Face Hub: `python -m vim_timm.hub.publish CHECKPOINT --repo-id ORG/NAME`.

Writes a folder with the weights as safetensors, timm's config.json, a model card, settings and log; evaluates what it
wrote; uploads it. `--dry-run` only writes. Afterwards `timm.create_model('hf-hub:ORG/NAME', pretrained=True)` and
`'local-dir:FOLDER'` give the same logits. An upload that broke off goes on with the same command line.
"""

if __name__ == '__main__':  # the command line is read before torch is imported
    import sys

    from vim_timm import commands

    sys.exit(commands.main('publish'))

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from timm.models import get_deprecated_models, get_pretrained_cfg

from ..data.images import MODES
from ..engine.build import published_cfg
from ..engine.saved import Saved, open_saved
from ..errors import UserError, explain, run
from ..models.checkpoint import CheckpointError
from ..models.pretrained import PACKAGED, sha256
from ..report.chart import duration
from ..settings import parsers
from ..settings.inherited import data_of
from .card import Facts, card
from .folder import FILES, WEIGHTS, check_folder, finish_folder, replacing, write_folder
from .repeat import arguments, command, data_flags, train_command, without_path

PROGRAM = 'publish'
EMBEDDED_LIMIT = 3_000_000  # bytes of a weight that comes with the package


def evaluate(folder: Path, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The row that validate.py prints for the model in a folder, from a process of its own.

    Raises:
        UserError: it failed; its own sentence is on the terminal.
    """
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, 'result.json')
        where = {'model': f'local-dir:{folder}', 'pretrained': True, 'results_file': path, 'results_format': 'json'}
        words = [sys.executable, '-m', 'vim_timm.validate', *arguments({**flags, **where})]
        if subprocess.run(words).returncode or not os.path.isfile(path):
            raise UserError(
                'the model could not be evaluated: name its data with --data-dir, or a result of validate.py '
                '(--results-file) with --results, or say --no-evaluate'
            )
        return _result(path)


def read_result(path: str, model: str) -> dict[str, Any]:
    """The row of a model (its registered name) in a results file of validate.py.

    Raises:
        UserError: the file has no such row, or that of another model.
    """
    with explain(f'--results {path}'):
        row = _result(path)
        name = str(row.get('model', ''))
        known = published_cfg(name).get('architecture', '') if ':' in name else name.partition('.')[0]
        if (get_deprecated_models().get(known) or known).partition('.')[0] != model:
            raise ValueError(f'it is the result of {name or "no model by name"}, and the checkpoint holds {model}')
        return row


def _result(path: str) -> dict[str, Any]:
    row = json.loads(Path(path).read_text(encoding='utf-8'))
    numbers: list[Any] = [row.get(name) for name in ('top1', 'top5', 'count')] if isinstance(row, dict) else [None]
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(
            'it is no result of one model (top1, top5, count), written by validate.py --results-format json'
        )
    return row


def facts(args: argparse.Namespace, saved: Saved, source: str, flags: Mapping[str, Any]) -> Facts:
    """What the card of a model tells, but for its accuracy."""
    shown = {name: without_path(name, value) for name, value in flags.items()}
    ours = _ours(saved)
    # from weights that have a licence of their own
    derived = not ours or any(saved.run.get(name) for name in ('pretrained', 'initial_checkpoint'))
    history = saved.record.get('history') or []
    made = dict(saved.record.get('provenance') or {})
    if history:
        made['epochs'] = str(len(history))
        if history[-1].get('time'):
            made['training and evaluation'] = duration(history[-1]['time'])
    if ours:
        made['seed'] = str(saved.run.get('seed', ''))
    if args.use_ema:
        made['weights'] = 'their moving average'
    parameters = sum(parameter.numel() for parameter in saved.model.parameters())
    size = saved.data_config['input_size']
    return Facts(
        name=args.repo_id.rpartition('/')[2],
        source=source,
        architecture=saved.architecture,
        parameters=parameters,
        image=size,
        dtype='float16' if args.half else 'float32',
        license=args.license,
        notes=saved.model.pretrained_cfg.get('notes') or () if derived else (),
        dataset=str(saved.run.get('dataset') or '') if ours else '',
        data_name=args.data_name,
        split=_split(flags),
        evaluate=command('validate', {'model': source, 'pretrained': True, **shown}),
        train=train_command(saved.run) if ours else '',
        made=made,
        class_names=saved.class_names,
        encoder=not saved.model.num_classes,
        mode='' if saved.run.get('dataset') == 'arrays' else saved.image_mode or MODES.get(size[0], ''),
    )


def _ours(saved: Saved) -> bool:
    """Whether a run of train.py made the weights, not the original's."""
    return bool(saved.run) and 'data_set' not in saved.run


def configuration(saved: Saved, told: Facts) -> dict[str, Any]:
    """The configuration of a model's own weights: its name has that of the weights which are usually loaded by it."""
    cfg = {**saved.model.pretrained_cfg, 'license': told.license}
    if _ours(saved):
        cfg.pop('tag', None)  # which tells, for instance, that classes are ImageNet's
        if not told.notes:
            cfg = {name: value for name, value in cfg.items() if name not in ('origin_url', 'notes')}
    return cfg


def _split(flags: Mapping[str, Any]) -> str:
    """What was evaluated, in words."""
    split, share = str(flags.get('split', 'validation')), flags.get('val_fraction')
    return f'{share:g} of {split}, held out' if share else split


def write(args: argparse.Namespace, folder: Path, source: str) -> None:
    """Write the whole folder of a checkpoint, card included."""
    saved = open_saved(args.checkpoint, args.model, args.use_ema)
    given = {'data_dir': args.data_dir} if args.data_dir else {}
    flags = {**data_flags(saved.run), **given}
    told = facts(args, saved, source, flags)
    data = None
    if args.results:
        told.result = read_result(args.results, saved.architecture)
    elif not args.no_evaluate and saved.model.num_classes:  # an encoder alone has no accuracy
        try:
            data = data_of({'args': {**saved.run, **given}}, args.checkpoint)
        except UserError as error:
            raise UserError(f'{error}; a result of validate.py (--results-file) goes into --results') from error
    private = [value for value in saved.run.values() if isinstance(value, str) and os.path.isabs(value)]
    saved.model.pretrained_cfg = configuration(saved, told)
    with replacing(folder) as new:
        write_folder(new, saved, args.half)
        if data is not None:
            told.result = evaluate(new, data)
        finish_folder(new, card(told), private)


def upload(folder: Path, repo_id: str, private: bool) -> None:
    """Upload a folder's files, and compare the weights' SHA-256 there with ours.

    Raises:
        UserError: it failed; what is there already is not sent again by the same call.
    """
    check_folder(folder)
    api = HfApi()
    with explain(f'the upload to {repo_id} broke off, and the same command line goes on with it'):
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=str(folder), allow_patterns=list(FILES), commit_message='Upload model'
        )
        (there,) = api.get_paths_info(repo_id, [WEIGHTS])
        digest = getattr(getattr(there, 'lfs', None), 'sha256', '')
        if digest != sha256(folder / WEIGHTS):
            raise CheckpointError(f'the weights there have another SHA-256 ({digest})')
    print(f'{repo_id}: {api.endpoint}/{repo_id}')


def embedded() -> list[Path]:
    """Folders of the weights that come with the package."""
    return sorted(path.parent for path in PACKAGED.glob('*/config.json'))


def upload_all(owner: str, private: bool, dry_run: bool) -> None:
    """Upload every folder of the package's weights, and print the configuration lines to change."""
    folders = embedded()
    if not folders:
        raise UserError('no weights come with this package')
    for folder in folders:
        check_folder(folder) if dry_run else upload(folder, f'{owner}/{folder.name}', private)
    print('once they are there, the configurations are (`default_cfgs` of the models):')
    for folder in folders:
        print(f"    '{folder.name}': hf_hub_id='{owner}/{folder.name}', hf_hub_filename='{WEIGHTS}'")


def embed(args: argparse.Namespace) -> Path:
    """Write the folder of a weight that comes with the package, in float16.

    Raises:
        UserError: there is no such configuration, or the file is too large.
    """
    name = args.embed
    with explain(f'--embed {name}: add it to `default_cfgs` first'):
        get_pretrained_cfg(name, allow_unregistered=False)
    args.half, args.repo_id, folder = True, name, PACKAGED / name
    write(args, folder, name)
    size = (folder / WEIGHTS).stat().st_size
    if size > EMBEDDED_LIMIT:
        raise UserError(f'{folder / WEIGHTS} has {size:,} bytes, more than the {EMBEDDED_LIMIT:,} for the package')
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""

    def body(words: Sequence[str]) -> None:
        args = parsers.publish(words)
        if args.repo_id:
            with explain('--repo-id'):
                validate_repo_id(args.repo_id)
        if args.all:
            return upload_all(args.repo_id.partition('/')[0], args.private, args.dry_run)
        if args.embed:
            return print(f'written: {embed(args)}')
        folder = Path(args.checkpoint)
        if not folder.is_dir():
            args.repo_id = args.repo_id or folder.name.partition('.')[0]
            folder = Path(args.output or os.path.join('output', 'publish', args.repo_id.rpartition('/')[2]))
            write(args, folder, f'hf-hub:{args.repo_id}')
            print(f'written: {folder}')
        if not args.dry_run:
            upload(folder, args.repo_id, args.private)

    return run(body, PROGRAM, argv)
