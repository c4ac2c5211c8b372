"""The picture of the README, drawn from the tables of docs/cifar10.md and docs/benchmarks.md.

python -m benchmarks.picture     # writes docs/images/speed_and_accuracy.png
"""

import re
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parents[1] / 'docs'
COLOURS = {'vim2': '#0b6e4f', 'vim_hybrid': '#3b8ea5', 'vim': '#d1812d'}
GREY = '#9a9a9a'


def accuracies(text: str) -> list[tuple[str, float, float]]:
    """Model, top-1 and its spread (%) of the first table of models at equal time, the best first."""
    table = text[text.index('| model | M parameters') :].split('\n\n')[0]
    row = re.compile(r'^\|(?: timm\'s)? `(\w+)`[^|]*\|.*\| \**([\d.]+) ± ([\d.]+)\** \|$', re.M)
    return [(name, float(top1), float(spread)) for name, top1, spread in row.findall(table)]


def speeds(text: str, model: str) -> list[tuple[int, float]]:
    """Side (pixels) and inference over DeiT's of the size, from the first table of models on a GPU."""
    table = text[text.index('| model | size, batch | mode') :].split('\n\n')[0]
    row = re.compile(rf'^\| `{model}_patch16_224` \| (\d+), \d+ \| infer \|.*?\|.*?\| ([\d.]+) \|', re.M)
    return [(int(side), float(ratio)) for side, ratio in row.findall(table)]


def main() -> None:
    of_models = accuracies((DOCS / 'cifar10.md').read_text(encoding='utf-8'))
    benchmarks = (DOCS / 'benchmarks.md').read_text(encoding='utf-8')
    plt.rcParams.update({'font.size': 9, 'axes.spines.top': False, 'axes.spines.right': False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), width_ratios=(1.15, 1))

    best: dict[str, tuple[float, float]] = {}
    for name, top1, spread in of_models:
        best.setdefault(name.split('_patch')[0], (top1, spread))
    for place, (name, (top1, spread)) in enumerate(reversed(best.items())):
        colour = COLOURS.get(name.removesuffix('_tiny'), GREY)
        left.barh(place, top1, xerr=spread, color=colour, height=0.65, error_kw={'ecolor': '#444444', 'lw': 1})
        left.text(2, place, name, va='center', color='white', weight='bold')
        left.text(top1 + spread + 1, place, f'{top1:.1f}', va='center')
    left.set(xlim=(0, 92), yticks=[], xlabel='top-1 (%)', title='CIFAR-10 after 16 s of training on one H200')

    for model, above in (('vim2_tiny', 8), ('vim_tiny', -16)):
        sides, ratios = zip(*speeds(benchmarks, model))
        colour = COLOURS[model.removesuffix('_tiny')]
        right.plot(sides, ratios, marker='o', color=colour)
        end = sides[-1], ratios[-1]
        right.annotate(model, end, (-6, above), textcoords='offset points', color=colour, ha='right')
    right.axhline(1, color=GREY, lw=1)
    right.text(1248, 1.03, 'DeiT-Ti', color='#6a6a6a', ha='right', va='bottom')
    right.set(ylim=(0, 3), xlabel='image side (pixels)', title='Inference on one H200, over DeiT-Ti', xticks=sides)
    figure.tight_layout()
    figure.savefig(DOCS / 'images' / 'speed_and_accuracy.png', dpi=110)


if __name__ == '__main__':
    main()
