"""A checkpoint becomes a folder that timm, the Hub and a reader of its card accept, and is uploaded without secrets."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from hub_server import TOKEN, sha256
from huggingface_hub import ModelCard
from PIL import Image
from test_hub_download import hub  # noqa: F401  a fixture

from vim_timm import train
from vim_timm.engine.provenance import commit
from vim_timm.engine.saved import Saved
from vim_timm.errors import UserError
from vim_timm.hub import folder as folders
from vim_timm.hub import publish
from vim_timm.hub.publish import main
from vim_timm.hub.repeat import public, train_command
from vim_timm.models import pretrained

MODEL = '--model vim_nano_patch4_32 --img-size 16 --model-kwargs depth=1 embed_dim=32 --model-ema'


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder of a short training run, with a moving average and a path that nobody else should read."""
    output = tmp_path_factory.mktemp('runs')
    line = f'--dataset digits --epochs 1 --batch-size 128 --workers 0 --device cpu --lr 0.01 {MODEL} --output {output}'
    assert train.main([*line.split(), '--experiment', 'secret-experiment']) == 0
    return output / 'secret-experiment'


@pytest.fixture(scope='module')
def published(run, tmp_path_factory):
    """The folder that a dry run writes for the run, evaluated."""
    folder = tmp_path_factory.mktemp('published') / 'digits-vim'
    checkpoint = str(run / 'last.pth.tar')
    assert main([checkpoint, '--repo-id', 'org/digits-vim', '--output', str(folder), '--dry-run', '--use-ema']) == 0
    return folder


def trained(run, key='state_dict_ema') -> dict[str, torch.Tensor]:
    return torch.load(run / 'last.pth.tar', weights_only=True)[key]


def test_the_folder_holds_nothing_but_what_is_published(published):
    assert sorted(path.name for path in published.iterdir()) == sorted(folders.FILES)
    sums = dict(reversed(line.split()) for line in (published / 'SHA256SUMS').read_text().splitlines())
    assert sums == {name: sha256((published / name).read_bytes()) for name in folders.FILES if name != 'SHA256SUMS'}


def test_timm_loads_the_very_weights_from_it(run, published):
    model = timm.create_model(f'local-dir:{published}', pretrained=True)
    assert all(torch.equal(value, trained(run)[name]) for name, value in model.state_dict().items())
    assert (model.num_classes, model.patch_embed.img_size) == (10, (16, 16))
    assert model.pretrained_cfg['input_size'] == (3, 16, 16)


def test_the_configuration_is_json(published):
    config = json.loads((published / 'config.json').read_text())
    assert config['label_names'] == [str(digit) for digit in range(10)]
    assert config['model_args'].items() >= {'depth': 1, 'embed_dim': 32, 'img_size': [16, 16]}.items()


def test_the_card_tells_of_the_run(published):
    card = ModelCard((published / 'README.md').read_text())
    (top1, top5) = card.data.eval_results
    shown = re.search(r'\| (\d+) \| (\d+\.\d{3}) \| (\d+\.\d{3}) \|', card.text)
    assert int(shown[1]) == 359 and float(shown[2]) == top1.metric_value and float(shown[3]) == top5.metric_value
    assert (card.data.license, card.data.library_name) == ('apache-2.0', 'timm')
    for text in (
        'vim_timm.train --dataset digits',
        '* training and evaluation: ',
        '* weights: their moving average',
        'epochs 1',
        'hf-hub:org/digits-vim',
        'seed: 42',
        'import vim_timm',
    ):
        assert text in card.text
    assert commit() in card.text  # '' where git knows nothing of the package
    code = re.search(r'```python\n(.*?)```', card.text, re.DOTALL)[1]
    assert code.index('import vim_timm') < code.index('create_model')
    assert yaml.safe_load((published / 'args.yaml').read_text())['model_kwargs'] == {'depth': 1, 'embed_dim': 32}
    assert (published / 'summary.csv').read_text().startswith('epoch,train_loss')


@pytest.mark.parametrize(
    ('told', 'line'),
    [
        ({'dataset': 'arrays'}, 'channels = torch.rand(3, 16, 16)'),
        ({'input_img_mode': 'YCbCr'}, "Image.open('image.png').convert('YCbCr')"),
    ],
)
def test_the_code_of_the_card_reads_images_as_they_were_trained_on(told, line, run, tmp_path, monkeypatch):
    content = torch.load(run / 'last.pth.tar', weights_only=True)
    content['args'].update(told)
    torch.save(content, tmp_path / 'last.pth.tar')
    words = ['--repo-id', 'org/x', '--output', str(tmp_path / 'x'), '--dry-run', '--no-evaluate']
    assert main([str(tmp_path / 'last.pth.tar'), *words]) == 0
    code = re.search(r'```python\n(.*?)```', (tmp_path / 'x' / 'README.md').read_text(), re.DOTALL)[1]
    assert line in code
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (20, 20)).save('image.png')
    found = {}
    exec(code.replace('hf-hub:org/x', f'local-dir:{tmp_path / "x"}'), found)
    assert found['scores'].shape == (1, 10)


def test_neither_path_nor_name_of_this_machine_is_told(run, published):
    for path in published.iterdir():
        content = path.read_bytes()
        for secret in (str(run.parent), 'secret-experiment', str(Path.home()), os.getcwd()):
            assert secret.encode() not in content, (path.name, secret)


def test_a_token_or_path_in_the_folder_ends_the_upload(published, tmp_path, capsys):
    for name, text in (('README.md', f'HF_TOKEN={TOKEN}'), ('args.yaml', f'data: {Path.home()}/images')):
        (tmp_path / name).mkdir()
        for path in published.iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
        (tmp_path / name / name).write_text(text)
        (tmp_path / name / 'SHA256SUMS').unlink()
        with pytest.raises(Exception, match='would tell a path of this machine or a token'):
            folders.finish_folder(tmp_path / name, text if name == 'README.md' else 'card')


def test_upload_resumes_and_gives_the_same_logits(published, hub, monkeypatch, capsys, tmp_path):  # noqa: F811
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    line = [str(published), '--repo-id', 'org/digits-vim', '--private']
    hub.fault('/commit/', status=500)
    assert main(line) == 2
    assert re.search(r'publish: error: the upload to org/digits-vim broke off, .*\n$', capsys.readouterr().err)
    assert main(line) == 0
    assert hub.uploads == 1  # the weights went over once
    repository = hub.repositories['org/digits-vim']
    assert repository.private and sorted(repository.files) == sorted(folders.FILES)
    assert not [name for name in repository.files if name.endswith(('.bin', '.pth', '.pt', '.tar', '.pkl'))]
    assert all(TOKEN.encode() not in content for content in repository.files.values())
    images = torch.rand(2, 3, 16, 16)
    logits = [
        timm.create_model(source, pretrained=True).eval()(images)
        for source in ('hf-hub:org/digits-vim', f'local-dir:{published}')
    ]
    assert torch.equal(*logits)


def test_upload_without_a_token_is_one_sentence(published, hub, capsys):  # noqa: F811
    assert main([str(published), '--repo-id', 'org/digits-vim']) == 2
    error = capsys.readouterr().err
    assert 'org/digits-vim' in error and error.count('\n') == 1 and not hub.uploads


def test_changed_files_are_not_published(published, hub, monkeypatch, tmp_path, capsys):  # noqa: F811
    monkeypatch.setenv('HF_TOKEN', TOKEN)
    for path in published.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = (tmp_path / 'model.safetensors').read_bytes()
    (tmp_path / 'model.safetensors').write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert main([str(tmp_path), '--repo-id', 'org/name']) == 2
    assert 'SHA-256' in capsys.readouterr().err and not hub.requests


@pytest.mark.parametrize('line, words', [
    ([], 'name a checkpoint'),
    (['nowhere.pth', '--dry-run'], 'no checkpoint at nowhere.pth'),
    (['{run}/last.pth.tar'], 'name the repository'),
    (['{run}/last.pth.tar', '--repo-id', 'name-without-owner'], 'name the repository'),
    (['{run}', '--repo-id', 'org/name'], 'is no folder of a published model'),
    (['{run}/last.pth.tar', '--dry-run', '--no-evaluate', '--output', '{run}'], 'holds other files'),
    (['{run}/last.pth.tar', '--dry-run', '--results', '{run}/args.yaml', '--output', '{tmp}/a'], '--results'),
    (['{run}/last.pth.tar', '--embed', 'vim_tiny_patch4_32.nowhere'], 'add it to `default_cfgs`'),
])  # fmt: skip
def test_mistakes_end_in_a_sentence(line, words, run, tmp_path, capsys):
    assert main([word.format(run=run, tmp=tmp_path) for word in line]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1
    assert (run / 'last.pth.tar').is_file()


def test_a_weight_is_embedded_by_one_command(run, tmp_path, monkeypatch):
    """Its folder makes a configuration that claims weights, loads offline and in any size, and is checked."""
    for module in (pretrained, publish):
        monkeypatch.setattr(module, 'PACKAGED', tmp_path)
    name = 'vim_nano_patch4_32.cifar10'
    assert main([str(run / 'last.pth.tar'), '--embed', name, '--use-ema', '--no-evaluate']) == 0
    entries = pretrained.packaged(name)
    assert entries['label_names'] == tuple(str(digit) for digit in range(10))
    assert Path(entries['file']).stat().st_size < 3_000_000
    overlay = dict(pretrained_cfg_overlay=entries, depth=1, embed_dim=32, img_size=16)
    model = timm.create_model('vim_nano_patch4_32', pretrained=True, **overlay)
    assert torch.equal(model.norm.weight, trained(run)['norm.weight'].half().float())
    with open(entries['file'], 'r+b') as file:
        file.seek(-1, os.SEEK_END)
        file.write(b'?')
    with pytest.raises(ValueError, match='SHA-256'):
        timm.create_model('vim_nano_patch4_32', pretrained=True, **overlay)


def test_a_checkpoint_of_the_authors_keeps_their_contradicting_licence(tmp_path, monkeypatch):
    model = timm.create_model('vim_tiny_patch16_224', depth=1, embed_dim=32)
    saved = Saved(model, timm.data.resolve_model_data_config(model), [], {'data_set': 'IMNET'})
    monkeypatch.setattr(publish, 'open_saved', lambda *_: saved)
    assert main(['vim_t.pth', '--dry-run', '--no-evaluate', '--output', str(tmp_path / 'vim')]) == 0
    card = ModelCard((tmp_path / 'vim' / 'README.md').read_text())
    assert card.data.license == 'apache-2.0' and 'non-commercial' in card.text and 'Not evaluated' in card.text


@pytest.mark.parametrize('name', timm.list_models(module='vision_mamba'))
def test_every_configuration_reloads_to_the_same_model(name, tmp_path):
    """Constructor arguments are JSON, and config.json gives the model back."""
    sizes = dict(depth=2, num_classes=3, in_chans=1, drop_path_rate=0.1, d_state=8)
    model = timm.create_model(name, **sizes)
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert repr(again.eval()) == repr(timm.create_model(name, **{**sizes, 'drop_path_rate': 0.0}).eval())


@pytest.mark.parametrize('given, told', [
    ({'initial_checkpoint': '../clients/acme/last.pth.tar'}, 'last.pth.tar'),
    ({'pretrained_path': 'clients/acme/w.pth'}, 'w.pth'),
    ({'class_map': 'clients/acme/map.txt'}, 'map.txt'),
    ({'model': 'local-dir:/mnt/clients/acme/vim/'}, 'local-dir:vim'),
    ({'kd_model_name': 'local-dir:clients/acme/vim'}, 'local-dir:vim'),
    ({'pretrained_cfg_overlay': {'file': 'clients/acme/w.pth'}}, {'file': 'w.pth'}),
    ({'data_dir': 'clients/acme'}, 'DATA'),
    ({'model': 'hf-hub:org/vim'}, 'hf-hub:org/vim'),
    ({'save_encoder': 'clients/acme/encoder.safetensors'}, None),
    ({'overwrite': True}, None),
], ids=str)  # fmt: skip
def test_a_run_tells_the_names_of_its_files_and_not_where_they_lay(given, told):
    (name,) = given
    assert public(given).get(name) == told
    assert 'acme' not in train_command(given)


def card_of(run, checkpoint, tmp_path, monkeypatch, **changes) -> str:
    """The card of the run's model, after changes of its settings."""
    saved = publish.open_saved(str(checkpoint), '', False)
    saved.run = {**saved.run, **changes}
    theirs = dict(tag='theirs_in1k', origin_url='https://theirs', notes=['Weights for non-commercial use.'])
    saved.model.pretrained_cfg = {**saved.model.pretrained_cfg, **theirs}
    monkeypatch.setattr(publish, 'open_saved', lambda *_: saved)
    line = [str(checkpoint), '--repo-id', 'org/x', '--dry-run', '--no-evaluate', '--output', str(tmp_path / 'x')]
    assert main(line) == 0
    return (tmp_path / 'x' / 'README.md').read_text()


def test_a_run_from_other_weights_keeps_the_notes_of_their_licence(run, tmp_path, monkeypatch):
    checkpoint = run / 'last.pth.tar'
    assert 'non-commercial' not in card_of(run, checkpoint, tmp_path, monkeypatch)
    for change in (dict(pretrained=True), dict(initial_checkpoint='clients/acme/vim_t.pth')):
        text = card_of(run, checkpoint, tmp_path, monkeypatch, **change)
        assert 'non-commercial' in text and 'acme' not in text


def test_the_configuration_is_of_the_runs_weights_and_not_of_those_of_its_models_name(run, tmp_path, monkeypatch):
    for change, kept in (dict(), set()), (dict(pretrained=True), {'origin_url', 'notes'}):
        card_of(run, run / 'last.pth.tar', tmp_path, monkeypatch, **change)
        cfg = json.loads((tmp_path / 'x' / 'config.json').read_text())['pretrained_cfg']
        assert cfg.keys() & {'tag', 'origin_url', 'notes'} == kept
    monkeypatch.undo()
    line = [str(run / 'last.pth.tar'), '--repo-id', 'org/x', '--dry-run', '--no-evaluate', '--license', 'mit']
    assert main([*line, '--output', str(tmp_path / 'x')]) == 0
    assert json.loads((tmp_path / 'x' / 'config.json').read_text())['pretrained_cfg']['license'] == 'mit'
    assert ModelCard((tmp_path / 'x' / 'README.md').read_text()).data.license == 'mit'


def test_images_of_a_folder_have_the_name_that_is_given_them(run, tmp_path):
    line = [str(run / 'last.pth.tar'), '--repo-id', 'org/x', '--dry-run', '--no-evaluate', '--data-name', 'my photos']
    assert main([*line, '--output', str(tmp_path / 'x')]) == 0
    assert ', trained on my photos: ' in (tmp_path / 'x' / 'README.md').read_text()


@pytest.mark.skipif(os.name != 'posix', reason='permissions of POSIX')
def test_every_file_may_be_read_as_any_new_file(published):
    (published.parent / 'new').touch()
    assert {path.stat().st_mode for path in published.iterdir()} == {(published.parent / 'new').stat().st_mode}


def test_the_command_of_the_evaluation_names_no_folder(run, tmp_path, monkeypatch):
    text = card_of(run, run / 'last.pth.tar', tmp_path, monkeypatch, class_map='clients/acme/map.txt')
    assert '--class-map map.txt' in text and 'acme' not in text


ROW = {'model': 'vim_nano_patch4_32', 'top1': 50.0, 'top5': 90.0, 'count': 40}


@pytest.mark.parametrize('row, words', [
    ({**ROW, 'model': 'vim_tiny_patch16_224'}, 'it is the result of vim_tiny_patch16_224'),
    ({name: ROW[name] for name in ('top1', 'top5', 'count')}, 'no model by name'),
    ({name: ROW[name] for name in ('model', 'top1')}, 'no result of one model'),
    ({**ROW, 'top5': 'NaN'}, 'no result of one model'),
    ([ROW, ROW], 'no result of one model'),
])  # fmt: skip
def test_a_result_that_is_not_this_models_is_refused_before_anything_is_written(row, words, run, tmp_path, capsys):
    (tmp_path / 'r.json').write_text(json.dumps(row))
    line = [str(run / 'last.pth.tar'), '--repo-id', 'org/x', '--dry-run', '--results', str(tmp_path / 'r.json')]
    assert main([*line, '--output', str(tmp_path / 'x')]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count('\n') == 1 and os.listdir(tmp_path) == ['r.json']


@pytest.mark.parametrize('name', ['org/na me', 'org/team/x', 'org/x.git', 'org/'])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_written(name, run, tmp_path, capsys):
    line = [str(run / 'last.pth.tar'), '--repo-id', name, '--dry-run', '--no-evaluate', '--output', str(tmp_path / 'x')]
    assert main(line) == 2
    assert '--repo-id: ' in (error := capsys.readouterr().err) and name in error and not os.listdir(tmp_path)


@pytest.mark.parametrize('name', ['vim_nano_patch4_32', 'vim_nano_patch4_32.cifar10', 'local-dir:{published}'])
def test_a_result_of_this_model_is_taken(name, run, published, tmp_path):
    (tmp_path / 'r.json').write_text(json.dumps({**ROW, 'model': name.format(published=published)}))
    line = [str(run / 'last.pth.tar'), '--repo-id', 'org/x', '--dry-run', '--results', str(tmp_path / 'r.json')]
    assert main([*line, '--output', str(tmp_path / 'x')]) == 0
    assert '| 40 | 50.000 | 90.000 |' in (tmp_path / 'x' / 'README.md').read_text()


def test_a_failed_evaluation_leaves_the_folder_of_before(run, published, tmp_path, monkeypatch):
    folder = tmp_path / 'x'
    shutil.copytree(published, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_):
        raise UserError('the model could not be evaluated')

    monkeypatch.setattr(publish, 'evaluate', fail)
    line = [str(run / 'last.pth.tar'), '--repo-id', 'org/x', '--dry-run', '--output', str(folder)]
    assert main(line) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and os.listdir(tmp_path) == ['x']
    monkeypatch.setattr(publish, 'evaluate', lambda *_: ROW)
    assert main(line) == 0 and os.listdir(tmp_path) == ['x']
    assert sorted(path.name for path in folder.iterdir()) == sorted(folders.FILES)
