"""Published weights over HTTP, from a Hub on loopback, and by every other route: the right ones or one sentence."""

import argparse
import io
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_server import TOKEN, Hub, sha256
from huggingface_hub import constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vim_timm import doctor, train, validate
from vim_timm.hub import from_original
from vim_timm.hub.convert import convert
from vim_timm.hub.convert import main as convert_main
from vim_timm.models.checkpoint import CheckpointError
from vim_timm.models.pretrained import published
from vim_timm.settings import Process

SIZES = dict(depth=1, embed_dim=32)
REPOSITORY, FILE = 'hustvl/Vim-tiny-midclstok', 'vim_t_midclstok_76p1acc.pth'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub that the client of this process talks to, with a cache of its own."""
    with Hub() as server:
        for name, value in (
            ('ENDPOINT', server.endpoint),
            ('HUGGINGFACE_CO_URL_TEMPLATE', server.endpoint + '/{repo_id}/resolve/{revision}/{filename}'),
            ('HF_HUB_OFFLINE', False),
            ('HF_HUB_DISABLE_XET', True),
            ('DOWNLOAD_CHUNK_SIZE', 1 << 16),
            ('HF_HUB_CACHE', str(tmp_path / 'cache')),
            ('HF_TOKEN_PATH', str(tmp_path / 'token')),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(time, 'sleep', lambda seconds, wait=time.sleep: wait(min(seconds, 0.05)))  # of its retries
        yield server


def build(**kwargs) -> torch.nn.Module:
    return timm.create_model('vim_tiny_patch16_224', **{**SIZES, **kwargs})


def original(seed: int, **kwargs) -> dict[str, torch.Tensor]:
    """Weights under the original's names; the position embedding's rows stand in its order."""
    torch.manual_seed(seed)
    state = build(**kwargs).state_dict()
    rows, middle = state['pos_embed'], (state['pos_embed'].shape[1] - 1) // 2
    state['pos_embed'] = torch.cat([rows[:, 1 : middle + 1], rows[:, :1], rows[:, middle + 1 :]], dim=1)
    return {re.sub(r'^norm\.', 'norm_f.', re.sub(r'^blocks\.', 'layers.', name)): state[name] for name in state}


def expected(seed: int, **kwargs) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return build(**kwargs).state_dict()


def same(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def authors_file(**kwargs) -> bytes:
    """A training checkpoint exactly as the authors published theirs, `model_ema` other than `model`."""
    file = io.BytesIO()
    name = 'vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2'
    content = {
        'model': original(1, **kwargs),
        'optimizer': {'state': {0: {'step': torch.tensor(9.0), 'exp_avg': torch.zeros(3)}}, 'param_groups': []},
        'lr_scheduler': {'base_values': [1e-3]},
        'epoch': 299,
        'model_ema': original(2, **kwargs),
        'scaler': {},
        'args': argparse.Namespace(model=name, input_size=224, lr=5e-4, device='cuda', output_dir='/data/out'),
    }
    torch.save(content, file)
    return file.getvalue()


def timm_folder(seed: int, pickled: bool = False) -> dict[str, bytes]:
    """What timm saves for the Hub."""
    torch.manual_seed(seed)
    model, folder = build(num_classes=5), Path(os.environ['PYTEST_TMP'])
    timm.models.save_for_hf(model, folder, safe_serialization=not pickled)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTEST_TMP', str(tmp_path / 'saved'))


class TestAuthors:
    def test_pretrained_downloads_loads_and_moves_the_class_token(self, hub):
        hub.add(REPOSITORY, {FILE: authors_file()})
        assert same(build(pretrained=True), expected(1))
        assert same(timm.create_model('vim_tiny_patch16_224.hustvl_in1k', pretrained=True, **SIZES), expected(1))
        assert len(hub.seen('GET', '/cdn/')) == 1  # the second found it in the cache, after one look at its ETag
        assert len(hub.seen('HEAD', FILE)) == 2

    def test_classes_channels_and_sizes_other_than_pretrained(self, hub):
        hub.add(REPOSITORY, {FILE: authors_file()})
        assert build(pretrained=True, num_classes=7).head.weight.shape == (7, 32)
        assert build(pretrained=True, num_classes=0)(torch.zeros(1, 3, 224, 224)).shape == (1, 32)
        weight = build(pretrained=True, in_chans=1).patch_embed.proj.weight
        torch.testing.assert_close(weight, expected(1)['patch_embed.proj.weight'].sum(1, keepdim=True))
        model = build(pretrained=True, img_size=(160, 256))
        assert model.pos_embed.shape == (1, 161, 32)
        assert torch.equal(model.pos_embed[:, 0], expected(1)['pos_embed'][:, 0])
        maps = build(pretrained=True, features_only=True, out_indices=(0,))(torch.zeros(1, 3, 224, 224))
        assert maps[-1].shape == (1, 32, 14, 14)

    def test_overlapping_patches_keep_their_position_embedding(self, hub):
        stride = dict(stride=8)
        hub.add(REPOSITORY, {'vim_t_midclstok_ft_78p3acc.pth': authors_file(**stride)})
        model = timm.create_model('vim_tiny_patch16_stride8_224', pretrained=True, **SIZES)
        assert model.pos_embed.shape == (1, 27 * 27 + 1, 32)
        assert same(model, expected(1, **stride))

    def test_a_revision_can_be_pinned(self, hub):
        first = hub.add(REPOSITORY, {FILE: authors_file()})
        hub.add(REPOSITORY, {FILE: b'something else'})
        hub.repositories[REPOSITORY].refs['v1'] = first
        for revision in (first, 'v1'):
            overlay = dict(hf_hub_id=f'{REPOSITORY}@{revision}')
            assert same(build(pretrained=True, pretrained_cfg_overlay=overlay), expected(1))
        with pytest.raises(RevisionNotFoundError):
            build(pretrained=True, pretrained_cfg_overlay=dict(hf_hub_id=f'{REPOSITORY}@v2'))


class TestEveryRouteGivesModel:
    """A file with both `model` and `model_ema` gives `model`, unless the average is asked for."""

    @pytest.fixture
    def path(self, tmp_path):
        (tmp_path / FILE).write_bytes(authors_file())
        return tmp_path / FILE

    def test_pretrained_from_the_hub(self, hub, path):
        hub.add(REPOSITORY, {FILE: path.read_bytes()})
        assert same(build(pretrained=True), expected(1))

    @pytest.mark.parametrize('key', ['file', 'hf_hub_id', 'url'])
    def test_another_place_of_the_weights(self, hub, path, key, monkeypatch, tmp_path):
        monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
        digest = hub.add(REPOSITORY, {FILE: path.read_bytes()}) and next(iter(hub.objects))
        places = {'file': str(path), 'hf_hub_id': REPOSITORY, 'url': (f'{hub.cdn}/{digest}', 'weights.pth')}
        overlay = {'hf_hub_id': None, key: places[key]}
        assert same(build(pretrained=True, pretrained_cfg_overlay=overlay), expected(1))

    def test_a_repository_or_folder_with_a_pickle(self, hub, tmp_path):
        files = {**timm_folder(0, pickled=True), 'pytorch_model.bin': authors_file(num_classes=5)}
        hub.add('org/pickled', files)
        (tmp_path / 'folder').mkdir()
        for name, content in files.items():
            (tmp_path / 'folder' / name).write_bytes(content)
        for source in ('hf-hub:org/pickled', f'local-dir:{tmp_path / "folder"}'):
            assert same(timm.create_model(source, pretrained=True), expected(1, num_classes=5))

    @pytest.mark.parametrize('flags', ['--pretrained', '--pretrained --pretrained-path {path}',
                                       '--initial-checkpoint {path}'])  # fmt: skip
    def test_training(self, hub, path, flags):
        hub.add(REPOSITORY, {FILE: path.read_bytes()})
        common = '--dataset digits --device cpu --num-classes 1000 --model-kwargs depth=1 embed_dim=32'
        args = train.parse_args(f'{common} --model vim_tiny_patch16_224 {flags.format(path=path)}'.split())
        model = train.build.make_training_model(args, Process())
        if args.pretrained_path:  # timm makes a new head for these
            model.head.load_state_dict({'weight': expected(1)['head.weight'], 'bias': expected(1)['head.bias']})
        assert same(model, expected(1))

    @pytest.mark.parametrize('flag, seed', [('', 1), ('--use-ema', 2)])
    def test_validate(self, path, flag, seed):
        line = (
            f'--dataset digits --device cpu --num-classes 1000 --model vim_tiny_patch16_224 --checkpoint {path} {flag}'
        )
        args, content = validate.read_args([*line.split(), *flag.split(), '--model-kwargs', 'depth=1', 'embed_dim=32'])
        assert same(validate._ready_model(args, Process(), None, content)[0], expected(seed))

    def test_convert(self, path, tmp_path, monkeypatch):
        monkeypatch.setattr('vim_timm.hub.convert.find_architecture', lambda model: '')
        content = torch.load(path, weights_only=False)
        content['args'] = argparse.Namespace()  # the shapes then tell the architecture
        torch.save(content, path)
        for use_ema in (False, True):
            convert(path, tmp_path / 'out.safetensors', use_ema=use_ema)
            found = safetensors.torch.load_file(tmp_path / 'out.safetensors')
            assert found.keys() == expected(1).keys()
            assert all(torch.equal(found[name], value) for name, value in expected(1 + use_ema).items())

    def test_from_original(self, path):
        content = torch.load(path, weights_only=False)
        assert same(from_original(content['model'], depth=1, embed_dim=32), expected(1))


class TestRepositories:
    def test_what_timm_publishes_loads_from_hub_and_folder(self, hub, tmp_path):
        hub.add('org/name', timm_folder(3))
        images = torch.rand(1, 3, 224, 224)
        logits = [
            timm.create_model(source, pretrained=True).eval()(images)
            for source in ('hf-hub:org/name', f'local-dir:{tmp_path / "saved"}')
        ]
        assert torch.equal(*logits) and logits[0].shape == (1, 5)

    def test_a_private_repository_needs_the_token(self, hub, monkeypatch):
        hub.add('org/secret', timm_folder(3), private=True)
        with pytest.raises(RepositoryNotFoundError):
            timm.create_model('hf-hub:org/secret', pretrained=True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        timm.create_model('hf-hub:org/secret', pretrained=True)
        assert hub.seen('GET', '/cdn/') and all('authorization' not in headers for headers in hub.seen('GET', '/cdn/'))

    def test_a_file_that_changed_is_downloaded_again(self, hub):
        hub.add('org/name', timm_folder(3))
        first = timm.create_model('hf-hub:org/name', pretrained=True)
        hub.add('org/name', timm_folder(4))
        assert not same(timm.create_model('hf-hub:org/name', pretrained=True), first.state_dict())
        assert len(hub.seen('GET', '/cdn/')) == 2

    def test_the_cache_serves_without_the_hub(self, hub, monkeypatch):
        hub.add(REPOSITORY, {FILE: authors_file()})
        build(pretrained=True)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        requests = len(hub.requests)
        assert same(build(pretrained=True), expected(1)) and len(hub.requests) == requests
        with pytest.raises(LocalEntryNotFoundError):
            timm.create_model('vim_small_patch16_224', pretrained=True, **SIZES)


class TestFaults:
    def test_a_cut_connection_is_taken_up_where_it_ended(self, hub):
        content = authors_file()
        hub.add(REPOSITORY, {FILE: content})
        hub.fault('/cdn/', method='GET', cut=len(content) // 2)
        assert same(build(pretrained=True), expected(1))
        assert re.fullmatch(r'bytes=[1-9]\d+-', hub.seen('GET', '/cdn/')[1]['range'])

    def test_a_download_that_broke_off_leaves_the_cache_usable(self, hub):
        hub.add(REPOSITORY, {FILE: authors_file()})
        hub.fault('/cdn/', method='GET', cut=0, times=6)
        with pytest.raises(Exception, match=r'.+'):
            build(pretrained=True)
        assert same(build(pretrained=True), expected(1))

    @pytest.mark.parametrize('status', [429, 500, 503])
    def test_a_busy_hub_is_asked_again(self, hub, status):
        hub.add(REPOSITORY, {FILE: authors_file()})
        hub.fault('/resolve/', status=status, times=2)
        assert same(build(pretrained=True), expected(1))

    @pytest.mark.parametrize('status, error', [(401, HfHubHTTPError), (404, HfHubHTTPError), (500, HfHubHTTPError)])
    def test_a_refusal_is_the_clients_error(self, hub, status, error):
        hub.fault('/resolve/', status=status, times=99)
        with pytest.raises((error, LocalEntryNotFoundError)):
            build(pretrained=True)

    def test_a_slow_hub_is_waited_for(self, hub):
        hub.add(REPOSITORY, {FILE: authors_file()})
        hub.fault('/cdn/', delay=0.5)
        assert same(build(pretrained=True), expected(1))

    def test_a_file_shorter_than_announced_is_refused(self, hub):
        hub.add(REPOSITORY, {FILE: authors_file()})
        hub.fault('/cdn/', method='GET', short=1000, times=9)
        with pytest.raises(OSError, match='should be of size'):
            build(pretrained=True)
        hub.faults.clear()
        assert same(build(pretrained=True), expected(1))


def test_safetensors_cut_anywhere_is_refused_and_the_cache_stays_usable(hub):
    files, draw = timm_folder(3), random.Random(0)
    whole = files['model.safetensors']
    for length in [0, 7, 8, *(draw.randrange(len(whole)) for _ in range(47))]:
        hub.add('org/name', {**files, 'model.safetensors': whole[:length]})
        with pytest.raises(CheckpointError) as error:
            timm.create_model('hf-hub:org/name', pretrained=True)
        assert 'truncated' in str(error.value) and '\n' not in str(error.value)
    hub.add('org/name', files)
    timm.create_model('hf-hub:org/name', pretrained=True)


def test_the_doctor_finds_flipped_bytes_in_the_cache(hub, capsys):
    assert doctor.main(['--weights']) == 0
    assert capsys.readouterr().out.count('not downloaded') >= 5
    hub.add(REPOSITORY, {FILE: authors_file()})
    build(pretrained=True)
    assert doctor.main(['--weights']) == 0
    assert 'as it should be' in capsys.readouterr().out
    (blob,) = (path for path in Path(constants.HF_HUB_CACHE).rglob('blobs/*') if path.is_file())
    with open(blob, 'r+b') as file:
        file.seek(1000)
        file.write(bytes([file.read(1)[0] ^ 1]))
    assert doctor.main(['--weights']) == 2
    output = capsys.readouterr()
    assert 'vim_tiny_patch16_224.hustvl_in1k' in output.out and 'damaged' in output.out
    assert output.err == 'doctor: error: 1 of 6 weights are damaged\n'


def test_convert_finds_flipped_bytes(hub, tmp_path, capsys):
    content = authors_file()
    (tmp_path / 'in.pth').write_bytes(content)
    out = str(tmp_path / 'out.safetensors')
    flipped = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    (tmp_path / 'SHA256SUMS').write_text(f'{sha256(flipped)}  in.pth\n')
    for more in ([], ['--sha256', sha256(flipped)]):
        assert convert_main([str(tmp_path / 'in.pth'), out, *more]) == 1
        assert 'SHA-256' in capsys.readouterr().err and not os.path.exists(out)


def test_a_pickle_that_would_run_code_is_refused(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    file = io.BytesIO()
    torch.save({'model': original(1), 'args': Evil()}, file)
    hub.add(REPOSITORY, {FILE: file.getvalue()})
    with pytest.raises(CheckpointError, match='run code'):
        build(pretrained=True)
    assert not (tmp_path / 'executed').exists()


@pytest.mark.parametrize('fault, words', [
    (dict(status=500, times=99), ('status 500', 'HF_ENDPOINT', '--pretrained-path', '--checkpoint')),
    (dict(status=401, times=99), ('status 401', 'hf auth login')),
    (None, ('not in the cache', 'HF_ENDPOINT', 'HF_HOME')),
])  # fmt: skip
def test_a_command_line_names_the_ways_out(hub, fault, words, monkeypatch, tmp_path, capsys):
    (tmp_path / 'labels').write_text('\n'.join(map(str, range(10))))
    if fault:
        hub.fault('/resolve/', **fault)
    else:
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    flags = ['--valid-labels', str(tmp_path / 'labels'), '--device', 'cpu']
    assert validate.main(['--model', 'vim_tiny_patch16_224', '--pretrained', *flags]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words) and error.count('\n') == 1


@pytest.mark.parametrize('proxy', [False, True], ids=['straight', 'through a proxy'])
def test_the_environment_names_hub_cache_and_proxy(proxy, tmp_path):
    """HF_ENDPOINT, HF_HOME and HTTP_PROXY in a process of its own, as a user sets them."""
    with Hub() as server:
        server.add('org/name', timm_folder(3))
        code = "import timm, vim_timm; print(timm.create_model('hf-hub:org/name', pretrained=True).num_classes)"
        environment = {**os.environ, 'HF_HOME': str(tmp_path / 'home'), 'HF_HUB_DISABLE_XET': '1'}
        environment.update(HF_ENDPOINT=server.endpoint, HF_HUB_OFFLINE='0', NO_PROXY='127.0.0.1,localhost')
        if proxy:  # the server answers for any host that it is asked for
            environment.update(HF_ENDPOINT='http://hub.invalid', HTTP_PROXY=server.endpoint, NO_PROXY='')
        ask = [sys.executable, '-c', code]
        run = subprocess.run(ask, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == '5\n', run.stderr
    hosts = {headers['host'] for headers in server.seen('GET', 'config.json')}
    assert hosts == {'hub.invalid' if proxy else server.endpoint.removeprefix('http://')}
    assert list((tmp_path / 'home').rglob('model.safetensors'))


def test_a_model_without_published_weights_says_so():
    with pytest.raises(RuntimeError, match='no weights are published for vim2_mnist: leave out pretrained'):
        timm.create_model('vim2_mnist', pretrained=True)


def test_no_configuration_claims_weights_that_it_has_not():
    """A tag of ours has a place for its weights only once they are there."""
    for name, cfg in published().items():
        assert cfg.hf_hub_id in (None, *(f'hustvl/Vim-{size}-midclstok' for size in ('tiny', 'small', 'base'))), name
        assert cfg.hf_hub_id or Path(cfg.file).is_file()
