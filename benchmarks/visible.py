"""Time of encoders where a masked autoencoder hides patches, beside that of all patches.

    python -m benchmarks.visible [--models ...] [--ratio 0.75] [--batch 8] [--device cpu] [--threads 1]
        [--compile] [--weights bfloat16]

Both run in turn in one process, and the least time of each counts; on a CPU it is the process's processor time, of all
threads, which other programs hardly add to, on a GPU the device's between two events. There tokens are bfloat16, by
autocast or with `--weights bfloat16` as the weights are (inference alone), and a run is a CUDA graph, of eager layers
or with `--compile` of compiled ones: eager runs of small encoders take as long as their launches. The masks are drawn
in the run. The last column is the share of the time.
"""

import argparse
import time
from collections.abc import Callable

import timm
import torch

import vim_timm  # noqa: F401  registers the models
from vim_timm.layers.masking import random_masking
from vim_timm.models.masked_autoencoder import MaskedAutoencoder

MODELS = ['vim_tiny_patch16_224', 'vim2_tiny_patch16_224', 'vit_tiny_patch16_224']


def encoders(name: str, args: argparse.Namespace, train: bool) -> list[Callable[[], None]]:
    """Functions that run the encoder once, without and with hidden patches."""
    dtype = getattr(torch, args.weights)
    encoder = timm.create_model(name, num_classes=0).to(args.device, dtype).train(train)
    model = MaskedAutoencoder(encoder, args.ratio, decoder_dim=32, decoder_depth=1, decoder_heads=1)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device, dtype=dtype)

    def visible(images: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(args.batch, model.num_patches((224, 224)), device=args.device)
        keep = random_masking(noise, args.ratio)[0]
        return model._encode(*model._embed(images, keep), keep)

    forwards = [encoder.forward_features, visible]
    if args.compile:
        forwards = [torch.compile(forward) for forward in forwards]

    def run(hide: bool) -> None:
        mixed = args.device.startswith('cuda') and dtype == torch.float32
        with torch.set_grad_enabled(train), torch.autocast('cuda', torch.bfloat16, enabled=mixed):
            features = forwards[hide](images)
            if train:
                encoder.zero_grad()
                features.float().square().mean().backward()

    runs: list[Callable[[], None]] = [lambda: run(False), lambda: run(True)]
    return [recorded(once) for once in runs] if args.device.startswith('cuda') else runs


def processor_seconds(run: Callable[[], None]) -> float:
    """Seconds of a run by the processors' time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def device_seconds(run: Callable[[], None]) -> float:
    """Seconds of a run on the GPU."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """The run as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=MODELS)
    parser.add_argument('--ratio', type=float, default=0.75)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--weights', choices=('float32', 'bfloat16'), default='float32')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds_of = processor_seconds if args.device == 'cpu' else device_seconds
    print(f'| encoder | | all patches | {100 * args.ratio:g} % hidden | share |\n|---|---|---|---|---|')
    for name in args.models:
        for train in (False, True) if args.weights == 'float32' else (False,):
            runs = encoders(name, args, train)
            best = [float('inf')] * 2
            for _ in range(args.repeats + 1):  # the first is a warm-up, and never the least
                for i, run in enumerate(runs):
                    best[i] = min(best[i], seconds_of(run))
            times = ' | '.join(f'{1000 * seconds:.2f} ms' for seconds in best)
            print(f'| `{name}` | {"train" if train else "infer"} | {times} | {best[1] / best[0]:.3f} |', flush=True)


if __name__ == '__main__':
    main()
