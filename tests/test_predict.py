"""Pictures from anywhere become classes with names and scores, in a terminal, in files, and in Python."""

import csv
import json
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vim_timm import export, validate
from vim_timm.engine import explain, graphs
from vim_timm.engine.saved import Saved, open_saved
from vim_timm.errors import UserError
from vim_timm.predict import main, predictor

NAMES = ['cat', 'dog', 'cow', 'hen', 'pig']


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A training checkpoint with class names; its average is another model."""
    path = tmp_path_factory.mktemp('run') / 'last.pth.tar'
    arguments = dict(depth=1, embed_dim=32, img_size=16, num_classes=5)
    torch.manual_seed(0)
    states = [timm.create_model('vim_nano_patch4_32', **arguments).state_dict() for _ in range(2)]
    for state in states:
        state['head.weight'] *= 50  # scores that differ
    settings = dict(model='vim_nano_patch4_32', num_classes=5, img_size=16, model_kwargs=dict(depth=1, embed_dim=32))
    content = {'state_dict': states[0], 'state_dict_ema': states[1], 'args': settings, 'class_names': NAMES}
    torch.save(content, path)
    return str(path)


@pytest.fixture
def pictures(tmp_path):
    """A folder with pictures of many kinds, one that is damaged and one that is none."""
    folder, draw = tmp_path / 'pictures', np.random.default_rng(0)
    (folder / 'below').mkdir(parents=True)
    for name in ('2.png', '10.jpg', 'below/1.webp'):
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    Image.fromarray(draw.integers(0, 255, (40, 50), dtype=np.uint8)).save(folder / 'grey.png')
    (folder / 'damaged.jpg').write_bytes((folder / '10.jpg').read_bytes()[:200])
    (folder / 'notes.txt').write_text('no picture')
    (folder / '.hidden.png').write_bytes(b'')
    return folder


def test_a_line_a_picture_and_a_damaged_one_is_named(checkpoint, pictures, capsys):
    assert main([str(pictures), '--checkpoint', checkpoint, '--top', '2']) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert [re.search(r'pictures/(\S+)', line)[1] for line in lines] == [
        '2.png', '10.jpg', 'below/1.webp', 'damaged.jpg', 'grey.png',
    ]  # fmt: skip
    assert all(len(re.findall(r'(cat|dog|cow|hen|pig) [\d.]+ %', line)) == 2 for line in lines if 'damaged' not in line)
    assert 'not read' in lines[3] and output.err == '1 of 5 files could not be read\n'


@pytest.mark.parametrize('words', [['{}/2.png'], ['{}/*.png'], ['{}/**/*.webp'], ['{}/2.png', '{}', '{}/2.png']])
def test_files_folders_and_patterns(words, checkpoint, pictures, capsys):
    assert main([*(word.format(pictures) for word in words), '--checkpoint', checkpoint]) == 0
    assert (
        len(capsys.readouterr().out.splitlines())
        == {0: 1, 1: 2, 2: 1, 3: 5}[
            [['{}/2.png'], ['{}/*.png'], ['{}/**/*.webp']].index(words) if len(words) == 1 else 3
        ]
    )


def test_files_hold_the_same_numbers_as_the_model(checkpoint, pictures, tmp_path):
    for kind in ('json', 'csv', 'html'):
        assert main([str(pictures), '--checkpoint', checkpoint, '--output', str(tmp_path / f'x.{kind}')]) == 0
    rows = {row['file']: row for row in json.loads((tmp_path / 'x.json').read_text())}
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32, img_size=16, num_classes=5).eval()
    model.load_state_dict(torch.load(checkpoint)['state_dict'])
    image = Image.open(pictures / '2.png').convert('RGB')
    transform = timm.data.create_transform(**timm.data.resolve_input_data_config(model, {}))
    scores = model(transform(image)[None]).softmax(1)[0]
    found = rows[str(pictures / '2.png')]['predictions']
    assert [one['class'] for one in found] == [NAMES[label] for label in scores.argsort(descending=True)]
    assert [one['score'] for one in found] == pytest.approx(scores.sort(descending=True).values.tolist(), abs=1e-5)
    with open(tmp_path / 'x.csv', newline='') as file:
        table = {row['file']: row for row in csv.DictReader(file)}
    assert table.keys() == rows.keys() and table[str(pictures / '2.png')]['class_1'] == found[0]['class']
    assert table[str(pictures / 'damaged.jpg')]['error'] and not table[str(pictures / 'damaged.jpg')]['class_1']
    page = (tmp_path / 'x.html').read_text()
    assert page.count('<div class="sample">') == 4 and 'damaged.jpg' in page and 'http' not in page


def test_three_lines_of_python(checkpoint, pictures):
    classify = predictor(checkpoint=checkpoint, top=1)
    trained = {one.file: one for one in classify(str(pictures / '*.png'))}
    average = {one.file: one for one in predictor(checkpoint=checkpoint, top=1, use_ema=True)([str(pictures)])}
    assert all(len(one.classes) == len(one.scores) == 1 for one in trained.values())
    assert any(trained[file].scores != average[file].scores for file in trained)


def test_python_takes_one_model_too(checkpoint):
    for weights in ({}, dict(checkpoint=checkpoint, onnx='x.onnx')):
        with pytest.raises(UserError, match='name the weights'):
            predictor(**weights)


def test_features_are_the_pooled_ones(checkpoint, pictures, tmp_path):
    assert main([str(pictures), '--checkpoint', checkpoint, '--features', str(tmp_path / 'f.npy')]) == 0
    features = np.load(tmp_path / 'f.npy')
    assert features.shape == (5, 32)
    assert np.isnan(features).all(1).tolist() == [False, False, False, True, False]


def test_onnx_and_torch_export_predict_the_same(checkpoint, pictures, tmp_path, capsys):
    pytest.importorskip('onnxscript')
    for name in ('model.onnx', 'model.pt2'):
        assert export.main(['--checkpoint', checkpoint, '--output', str(tmp_path / name)]) == 0
        assert re.search(r'logits within \S+ of the model, relative to the largest\n', capsys.readouterr().out)
    assert main([str(pictures), '--onnx', str(tmp_path / 'model.onnx')]) == 0
    from_onnx = capsys.readouterr().out
    assert main([str(pictures), '--checkpoint', checkpoint]) == 0
    assert capsys.readouterr().out == from_onnx
    program = torch.export.load(tmp_path / 'model.pt2').module()
    classify = predictor(checkpoint=checkpoint)
    for count in (3, 5000):
        images = torch.rand(count, 3, 16, 16)
        torch.testing.assert_close(program(images), classify.model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('write', [graphs.export_onnx, graphs.export_torch])
@pytest.mark.parametrize('broken', ['model', 'graph'])
def test_values_that_are_not_finite_do_not_agree(broken, write, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    saved, file = open_saved(checkpoint), tmp_path / 'model'
    if broken == 'model':
        torch.nn.init.constant_(saved.model.get_classifier().bias, torch.inf)
        message = 'the model returns values that are not finite'
        for module in (torch.onnx, torch.export):  # said before the export, which takes a thousand times as long
            monkeypatch.delattr(module, 'export')
    else:
        compare, message = graphs._compare, r'relative difference nan\): not written'
        monkeypatch.setattr(
            graphs, '_compare', lambda saved, run, logits: compare(saved, lambda x: run(x) * torch.nan, logits)
        )
    with pytest.raises(UserError, match=message):
        write(saved, str(file))
    assert not file.exists()


def test_explain_shows_where_the_model_looks(checkpoint, pictures, tmp_path):
    line = [str(pictures / '2.png'), '--checkpoint', checkpoint, '--explain']
    assert main([*line, str(tmp_path / 'seen')]) == 0
    (picture,) = (tmp_path / 'seen').iterdir()
    assert picture.name == '0000-2.png' and Image.open(picture).size == (320, 320)
    assert main([*line, '--output', str(tmp_path / 'x.html')]) == 0
    assert 'where it looks' in (tmp_path / 'x.html').read_text()


def test_the_heat_lies_on_what_the_model_saw_of_the_picture(checkpoint, tmp_path):
    """Of a wide picture the square in its middle: white, where the sides are black."""
    wide = Image.new('RGB', (400, 100))
    wide.paste((255, 255, 255), (150, 0, 250, 100))
    wide.save(tmp_path / 'wide.png')
    line = [str(tmp_path / 'wide.png'), '--checkpoint', checkpoint, '--explain', str(tmp_path / 'seen')]
    assert main(line) == 0
    shown = np.asarray(Image.open(tmp_path / 'seen' / '0000-wide.png'))
    assert shown.shape[0] == shown.shape[1] and (shown[..., 0] > 200).all()  # neither side is in it
    classify = predictor(checkpoint=checkpoint, pictures=True)
    (found,) = classify(str(tmp_path / 'wide.png'))
    assert found.image.size == (400, 100) and found.seen.size == (16, 16)


def test_an_onnx_file_has_the_operators_that_were_asked_for(checkpoint, tmp_path, capsys):
    pytest.importorskip('onnxscript')
    path = tmp_path / 'old.onnx'
    assert export.main(['--checkpoint', str(checkpoint), '--output', str(path), '--opset', '3']) == 2
    assert 'cannot convert them to 3' in capsys.readouterr().err and not path.exists()


def test_an_onnx_file_of_a_fixed_batch_takes_any_number_of_pictures(checkpoint, pictures, tmp_path, capsys):
    pytest.importorskip('onnxscript')
    for number in range(6):
        Image.open(pictures / '2.png').rotate(60 * number).save(pictures / f'more{number}.png')
    path = str(tmp_path / 'four.onnx')
    assert export.main(['--checkpoint', checkpoint, '--output', path, '--batch-size', '4']) == 0
    capsys.readouterr()
    assert main([str(pictures), '--checkpoint', checkpoint]) == 0  # ten of them
    expected = capsys.readouterr().out
    for size in ('3', '4', '32'):
        assert main([str(pictures), '--onnx', path, '--batch-size', size]) == 0
        assert capsys.readouterr().out == expected


@pytest.mark.parametrize('entry', [
    None, '{}', '[]', '{"class_names": []}', '{"data_config": {"input_size": [3, 16, 16]}}', 'no json',
    '{"data_config": {"input_size": [3, 16, "x"]}, "class_names": []}',
    '{"data_config": {"mean": [0.5]}, "class_names": []}',
])  # fmt: skip
def test_an_onnx_file_of_another_program_ends_in_a_sentence(entry, pictures, tmp_path, capsys):
    pytest.importorskip('onnxscript')
    onnx = pytest.importorskip('onnx')
    shape = ['batch', 3, 16, 16]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in 'xy']
    graph = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['x'], ['y'])], 'g', ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid('', 18)], ir_version=9)
    if entry is not None:
        onnx.helper.set_model_props(model, {'vim_timm': entry})
    onnx.save(model, tmp_path / 'other.onnx')
    assert main([str(pictures), '--onnx', str(tmp_path / 'other.onnx')]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f'predict: error: ONNX file {tmp_path / "other.onnx"}: ') and error.count('\n') == 1


class Corner(torch.nn.Module):
    """A model whose second class is the brightness of the upper left corner alone."""

    num_prefix_tokens = 0

    def forward(self, images):
        corner = images[..., :8, :8].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(corner), corner], dim=1)


def test_the_explanation_finds_the_only_place_that_matters():
    heat = explain.integrated_gradients(Corner(), torch.rand(2, 3, 32, 32), torch.tensor([1, 1]))
    assert heat.shape == (2, 14, 14) and (heat[:, :3, :3] > 0.5).all() and (heat[:, 4:, 4:] == 0).all()
    random = torch.rand(2, 14, 14, generator=torch.Generator().manual_seed(0))
    images, labels = 3 * torch.ones(2, 3, 32, 32), torch.tensor([1, 1])
    (deletion, insertion), (lower, higher) = (explain.measure(Corner(), images, labels, m) for m in (heat, random))
    assert deletion < lower and insertion > higher


@pytest.mark.parametrize('name', ['test_vim', 'vim2_mnist', 'vim_hybrid_tiny_patch4_32', 'test_vit'])
def test_contributions_add_up_to_the_logit_in_every_family(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    images, labels = torch.randn(2, *model.default_cfg['input_size']), torch.tensor([3, 7])
    parts = explain.contributions(model, images, labels)
    with torch.no_grad():
        gain = (model(images) - model(torch.zeros_like(images))).gather(1, labels[:, None])[:, 0]
    assert (parts.flatten(1).sum(1) - gain).abs().max() < 0.05 * gain.abs().max()
    for method in (explain.integrated_gradients, explain.grad_cam):
        heat = method(model, images, labels)
        assert heat.shape == (2, *model.patch_embed.grid_size) and 0 <= heat.min() and heat.amax((1, 2)).eq(1).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_occlusion_finds_the_only_place_that_matters():
    heat = explain.occlusion(Corner(), torch.rand(2, 3, 28, 28), torch.tensor([1, 1]))
    assert (heat[:, :4, :4] > 0.2).all() and (heat[:, 4:].abs() < 1e-6).all() and (heat[:, :, 4:].abs() < 1e-6).all()


@pytest.mark.parametrize('words, sentence', [
    (['x.png'], 'name the weights'),
    (['x.png', '--checkpoint', 'a', '--onnx', 'b'], 'name the weights'),
    (['x.png', '--model', 'test_vim', '--pretrained'], '--model NAME takes the published weights by itself'),
    (['nowhere.png', '--checkpoint', '{checkpoint}'], 'there is no image nowhere.png'),
    (['{empty}', '--checkpoint', '{checkpoint}'], 'there are no images in'),
    (['x.png', '--checkpoint', '{checkpoint}', '--output', 'x.pdf'], 'must end in .json, .csv, .html'),
    (['x.png', '--checkpoint', '{checkpoint}', '--output', 'nowhere/x.csv'], 'there is no such folder'),
    (['x.png', '--checkpoint', '{checkpoint}', '--explain'], '--explain needs a place'),
    (['x.png', '--onnx', 'a.onnx', '--features', 'f.npy'], 'look inside the model'),
    (['x.png', '--checkpoint', '{checkpoint}', '--features', 'f.csv'], 'must end in .npy'),
    (['x.png', '--model', 'vim_nano_patch4_32', '--use-ema'], 'the moving average in a checkpoint'),
    (['x.png', '--onnx', 'a.onnx', '--use-ema'], 'the moving average in a checkpoint'),
    (['{empty}/a.jpg', '--checkpoint', '{empty}', '--use-ema'], 'holds one set of weights'),
    (['x.png', '--checkpoint', '{checkpoint}', '--top', '0'], 'at least 1'),
    (['{empty}/a.jpg', '--checkpoint', '{checkpoint}'], 'no image could be read'),
])  # fmt: skip
def test_mistakes_end_in_a_sentence(words, sentence, checkpoint, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    if words[0].endswith('a.jpg'):
        (tmp_path / 'empty' / 'a.jpg').write_bytes(b'no picture')
    assert main([word.format(checkpoint=checkpoint, empty=tmp_path / 'empty') for word in words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count('\n') == 1


def test_a_model_that_pools_nothing_has_no_classes_to_name(checkpoint, pictures, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content['args']['gp'] = ''
    torch.save(content, tmp_path / 'x.pth.tar')
    assert main([str(pictures / '2.png'), '--checkpoint', str(tmp_path / 'x.pth.tar')]) == 2
    assert 'returns no logits' in capsys.readouterr().err


def test_an_average_is_that_of_a_checkpoint(tmp_path, capsys):
    published = ['--model', 'vim_nano_patch4_32', '--use-ema']
    assert export.main([*published, '--output', str(tmp_path / 'x.onnx')]) == 2
    assert validate.main([*published, '--pretrained', '--dataset', 'digits']) == 2
    assert capsys.readouterr().err.count('the moving average in a checkpoint') == 2


def test_pictures_are_read_in_the_mode_that_was_trained_with(checkpoint, pictures, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    usual, file = str(tmp_path / 'usual.json'), str(tmp_path / 'x.pth.tar')
    assert main([str(pictures), '--checkpoint', str(checkpoint), '--output', usual]) == 0
    content['args']['input_img_mode'] = 'HSV'
    torch.save(content, file)
    assert export.main(['--checkpoint', file, '--output', str(tmp_path / 'x.onnx')]) == 0
    found = []
    for weights in (['--checkpoint', file, '--explain', str(tmp_path / 'heat')], ['--onnx', str(tmp_path / 'x.onnx')]):
        assert main([str(pictures), *weights, '--output', str(tmp_path / 'x.json')]) == 0
        found.append(
            [row['predictions'] for row in json.loads((tmp_path / 'x.json').read_text()) if 'error' not in row]
        )
    with open(usual) as opened:
        assert found[0] != [row['predictions'] for row in json.load(opened) if 'error' not in row]
    assert [[one['class'] for one in row] for row in found[0]] == [[one['class'] for one in row] for row in found[1]]
    content['args']['input_img_mode'] = 'CMYK'
    torch.save(content, file)
    capsys.readouterr()
    assert main([str(pictures), '--checkpoint', file]) == 2
    assert 'the model takes 3 channels, which images of mode CMYK do not have' in capsys.readouterr().err


def test_a_model_of_many_channels_says_that_files_have_not_so_many():
    model = timm.create_model('vim_nano_patch4_32', depth=1, embed_dim=32, in_chans=13).eval()
    from vim_timm.engine.predict import Predictor

    with pytest.raises(UserError, match='13 channels'):
        Predictor(Saved(model, timm.data.resolve_input_data_config(model, {}), []))
