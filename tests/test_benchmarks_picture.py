"""The README's picture is drawn from what the documents say."""

from benchmarks import picture


def test_the_tables_have_what_is_drawn():
    accuracies = picture.accuracies((picture.DOCS / 'cifar10.md').read_text(encoding='utf-8'))
    assert {'vim_hybrid_tiny_patch4_32', 'vim2_tiny_patch4_32', 'deit_tiny_patch16_224'} <= {
        row[0] for row in accuracies
    }
    assert all(50 < top1 < 90 and 0 < spread < 5 for _, top1, spread in accuracies)
    text = (picture.DOCS / 'benchmarks.md').read_text(encoding='utf-8')
    for model in ('vim2_tiny', 'vim_tiny'):
        assert [side for side, _ in picture.speeds(text, model)] == [224, 512, 1248]
    assert dict(picture.speeds(text, 'vim2_tiny'))[224] > 1
