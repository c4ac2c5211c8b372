"""Where tokens stand: class token first at a model's surface, in scan order between its first and its last block.

Functions of a placement of the class token: before patch M // 2 ('middle'), before all patches ('head'), two tokens
before and after them ('double'), or nowhere ('none').
"""

from typing import List, Literal, NamedTuple, Optional, Tuple

import torch

from vim_timm.ops import Visible, visible_neighbours

ClassToken = Literal['middle', 'head', 'double', 'none']

PREFIX_TOKENS = {'none': 0, 'head': 1, 'middle': 1, 'double': 2}


class Layout(NamedTuple):
    """Where the tokens (B, L, C) of a block stand.

    Attributes:
        grid: Rows and columns of the image's patches.
        prefix: Places in 0 .. L - 1 of the tokens that are no patches, ascending; the others are patches in row-major
            order.
        keep: Row-major indices (B, L - len(prefix)) of the patches that are there, ascending; None where all are.
            They are not looked at, for which a device would have to be waited for: patches in another order are scanned
            as they stand, or refused by the CPU's kernel.
        neighbours: What `ops.visible_neighbours` makes of keep, found once for all blocks; None has each find it.
    """

    grid: Tuple[int, int]
    prefix: List[int]
    keep: Optional[torch.Tensor]
    neighbours: Optional[torch.Tensor] = None


def prefix_places(class_token: str, num_patches: int) -> List[int]:
    """Places of the class tokens in the scan order of `num_patches` patches."""
    if class_token == 'middle':
        return [num_patches // 2]
    if class_token == 'head':
        return [0]
    if class_token == 'double':
        return [0, num_patches + 1]
    places: List[int] = []
    return places


def scan_layout(
    grid: Tuple[int, int], class_token: str, num_patches: int, keep: Optional[torch.Tensor], wanted: bool
) -> Layout:
    """Where the tokens of a trunk's blocks stand.

    Args:
        wanted: Whether a block's mixer may look at its `neighbours`.
    """
    prefix = prefix_places(class_token, num_patches)
    neighbours: Optional[torch.Tensor] = None
    if not torch.jit.is_scripting():
        if wanted and keep is not None and prefix == list(range(len(prefix))):
            neighbours = visible_neighbours(Visible(keep, len(prefix), grid[0], grid[1]))
    return Layout(grid, prefix, keep, neighbours)


def patch_places(layout: Layout, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Places (M,) of the patches that are there among the tokens, ascending."""
    places = torch.arange(num_tokens - len(layout.prefix), device=device)
    for place in layout.prefix:
        places = places + (places >= place).to(places.dtype)
    return places


def column_places(layout: Layout, device: torch.device) -> torch.Tensor:
    """Places (1 or B, L) of the tokens in the order of the columns of their image; class tokens keep theirs."""
    height, width = layout.grid
    keep = layout.keep
    if keep is None:
        order = torch.arange(height * width, device=device).reshape(height, width).t().reshape(1, height * width)
    else:
        order = torch.argsort(keep % width * height + keep // width, dim=1)
    for place in layout.prefix:
        order = order + (order >= place).to(order.dtype)
        own = torch.full([order.shape[0], 1], place, dtype=order.dtype, device=device)
        order = torch.cat([order[:, :place], own, order[:, place:]], dim=1)
    return order


def hidden_before(layout: Layout, column: bool) -> torch.Tensor:
    """How many hidden patches of a masked image lie between a patch and the one visited before it, float32 (B, L).

    The visit is by rows or by columns. None lie before the first patch, nor before class tokens.
    """
    height, width = layout.grid
    keep = layout.keep
    assert keep is not None
    places = keep % width * height + keep // width if column else keep
    visit = torch.argsort(places, dim=1)
    places = places.gather(1, visit)
    between = places[:, 1:] - places[:, :-1] - 1
    hidden = torch.zeros_like(places).scatter(1, visit[:, 1:], between).to(torch.float32)
    for place in layout.prefix:
        hidden = torch.cat([hidden[:, :place], hidden.new_zeros([hidden.shape[0], 1]), hidden[:, place:]], dim=1)
    return hidden


def patch_moves(layout: Layout, num_tokens: int, device: torch.device) -> torch.Tensor:
    """1 for patches, 0 for class tokens, (L,) float32."""
    moves = torch.zeros(num_tokens, device=device)
    return moves.index_fill(0, patch_places(layout, num_tokens, device), 1.0)


def to_scan_order(x: torch.Tensor, class_token: str) -> torch.Tensor:
    """Tokens (B, L, C), or anything else of L rows, from [cls, patches] to the order in which they are scanned."""
    if class_token == 'middle':
        middle = (x.shape[1] - 1) // 2
        return torch.cat([x[:, 1 : middle + 1], x[:, :1], x[:, middle + 1 :]], dim=1)
    if class_token == 'double':
        return torch.cat([x[:, :1], x[:, 2:], x[:, 1:2]], dim=1)
    return x


def to_prefix_order(x: torch.Tensor, class_token: str) -> torch.Tensor:
    """The inverse of `to_scan_order`."""
    if class_token == 'middle':
        middle = (x.shape[1] - 1) // 2
        return torch.cat([x[:, middle : middle + 1], x[:, :middle], x[:, middle + 1 :]], dim=1)
    if class_token == 'double':
        return torch.cat([x[:, :1], x[:, -1:], x[:, 1:-1]], dim=1)
    return x


def random_order(
    num_tokens: int, class_token: str, move_class: bool, shuffle: bool, device: torch.device
) -> torch.Tensor:
    """A random scan order, as indices (L,) into the usual one.

    Args:
        move_class: Put the one class token ('middle' or 'head') at a random place.
        shuffle: Shuffle all tokens.
    """
    order = torch.arange(num_tokens, device=device)
    if move_class:
        usual = prefix_places(class_token, num_tokens - 1)[0]
        patches = torch.cat([order[:usual], order[usual + 1 :]])
        place = int(torch.randint(num_tokens, [1], device='cpu'))
        order = torch.cat([patches[:place], order[usual : usual + 1], patches[place:]])
    if shuffle:
        order = order[torch.randperm(num_tokens, device=device)]
    return order
