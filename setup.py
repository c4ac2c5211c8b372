"""Packaging of vim-timm; the native CPU kernel is an optional part: without a C compiler the install still works."""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
VERSION = (ROOT / 'vim_timm' / 'version.py').read_text().split("'")[1]
README = ROOT / 'README.md'

CORE = [
    'torch>=2.6', 'torchvision', 'timm>=1.0.31', 'einops', 'safetensors', 'huggingface_hub', 'numpy', 'pyyaml',
    'pillow', 'tqdm',
]  # fmt: skip
TEST = ['pytest', 'pytest-timeout', 'pytest-xdist', 'hypothesis', 'ruff', 'mypy']
TRAIN = ['scikit-learn', 'scipy', 'torchmetrics', 'matplotlib', 'tensorboard']
HEIC = ['pillow-heif']
TIFF = ['tifffile']
EXPORT = ['onnx', 'onnxruntime', 'onnxscript']
COMPLETION = ['shtab']
CUDA = ['mamba-ssm', 'causal-conv1d']

# -ffast-math is left out on purpose: it would fold the rounding trick of the exponential, and linking with it makes gcc
# set flush-to-zero for the whole process.
FLAGS = ['-O3', '-std=gnu11', '-fvisibility=hidden', '-ffp-contract=fast', '-fno-math-errno', '-fno-trapping-math']
X86 = {'x86_64', 'AMD64', 'amd64'}
ARM64 = {'aarch64', 'arm64'}


def instruction_sets():
    """(name, float lanes of a vector, compiler flags) of every build of the kernel for this machine's architecture."""
    machine = platform.machine()
    if machine in X86:
        return [
            (
                'avx512',
                16,
                ['-mavx512f', '-mavx512dq', '-mavx512bw', '-mavx512vl', '-mfma', '-mprefer-vector-width=512'],
            ),
            ('avx2', 8, ['-mavx2', '-mfma']),
            ('baseline', 4, []),
        ]
    return [('neon' if machine in ARM64 else 'baseline', 4, [])]


class BuildKernel(build_ext):
    """Compiles kernel.c once per instruction set and links one plain shared library, which Python loads with ctypes."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split('.')) + ('.dll' if os.name == 'nt' else '.so')

    def get_export_symbols(self, ext):
        return []

    def build_extension(self, ext):
        try:
            self.compile_and_link(ext)
        except Exception as error:
            # Whatever goes wrong, vim-timm runs without it: setuptools warns, since the extension is optional.
            raise CompileError(
                f'the native CPU kernel was not built ({error}): CPUs take the slower torch backend'
            ) from error

    def compile_and_link(self, ext):
        if self.compiler.compiler_type == 'msvc':
            raise CompileError('MSVC has no vector extensions; build with clang or MinGW')
        if sys.platform == 'darwin':
            os.environ.setdefault('ARCHFLAGS', f'-arch {platform.machine()}')
        kernel, runtime = ext.sources
        sets = instruction_sets()
        objects = self.compiler.compile(
            [runtime],
            output_dir=self.build_temp,
            macros=[(f'HAVE_{name.upper()}', '1') for name, _, _ in sets],
            extra_postargs=FLAGS,
        )
        for name, lanes, flags in sets:
            objects += self.compiler.compile(
                [kernel],
                output_dir=os.path.join(self.build_temp, name),
                macros=[('LANES', str(lanes)), ('ISA', name)],
                extra_postargs=FLAGS + flags,
                depends=ext.depends,
            )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), extra_postargs=ext.extra_link_args)


class PlatformWheel(bdist_wheel):
    """`py3-none-<platform>` with the kernel inside (it knows no Python ABI), `py3-none-any` without."""

    def get_tag(self):
        self.root_is_pure = not any(Path(self.bdist_dir).rglob('libvim_timm_cpu.*'))
        return ('py3', 'none', 'any' if self.root_is_pure else super().get_tag()[2])


setup(
    name='vim-timm',
    version=VERSION,
    description='Vision Mamba as a first-class citizen of timm: CPU, CUDA, torch.compile and ONNX, nothing to compile.',
    long_description=README.read_text() if README.exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    keywords=['vision mamba', 'vim', 'state space model', 'selective scan', 'timm', 'pytorch', 'image classification'],
    classifiers=[
        'Development Status :: 4 - Beta',
        'Environment :: GPU :: NVIDIA CUDA',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    project_urls={
        'Paper': 'https://arxiv.org/abs/2401.09417',
        'Original code': 'https://github.com/hustvl/Vim',
    },
    entry_points={'console_scripts': ['vim-timm = vim_timm.commands:console']},
    python_requires='>=3.10',
    install_requires=CORE,
    extras_require={
        'train': TRAIN,
        'heic': HEIC,
        'tiff': TIFF,
        'cuda': CUDA,
        'export': EXPORT,
        'completion': COMPLETION,
        'test': TEST + TRAIN + HEIC + TIFF + EXPORT + COMPLETION,
    },
    packages=find_packages(include=['vim_timm', 'vim_timm.*']),
    package_data={
        'vim_timm': ['py.typed', 'recipes/*.yaml', 'weights/*', 'weights/*/*', '*.npz', '**/*.npz'],
        'vim_timm.report': ['page.css', 'page.js'],
        'vim_timm.ops.cpu': ['*.c', '*.h'],
        'vim_timm.ops.cuda': ['*.cu', '*.cuh'],
    },
    ext_modules=[
        Extension(
            'vim_timm.ops.cpu.libvim_timm_cpu',
            sources=['vim_timm/ops/cpu/kernel.c', 'vim_timm/ops/cpu/runtime.c'],
            depends=sorted(str(part.relative_to(ROOT)) for part in (ROOT / 'vim_timm/ops/cpu').glob('*.h')),
            extra_link_args=['-s'] if sys.platform.startswith('linux') else [],
            optional=True,
        )
    ],
    cmdclass={'build_ext': BuildKernel, 'bdist_wheel': PlatformWheel},
    zip_safe=False,
)
