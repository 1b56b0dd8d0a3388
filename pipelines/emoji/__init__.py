"""The bundled priors `emoji` and `emoji_flow`: a complete Stable Diffusion and a Stable Diffusion 3 that draw 64-pixel emoji.

`StableDiffusionPipeline.from_pretrained(str(path()))` loads the first, `StableDiffusion3Pipeline.from_pretrained(str(flow_path()))`
the second; this module only knows where they are and which words they understand, so it imports neither torch nor diffusers.
`python -m pipelines.emoji.build` makes the weights.
"""

from __future__ import annotations

from pathlib import Path

PATH = Path(__file__).parent / "weights"
FLOW = Path(__file__).parent / "flow"

# Concepts that all three sets draw, common and easy to tell apart at 64 pixels; "word=icon" where the set's own
# icon name is not the everyday word (for several animals the face is the clearer drawing).
_CONCEPTS = """
alarm-clock alien american-football anchor angry-face avocado banana baseball basketball bear bee=honeybee bell bicycle
blue-heart bomb book=closed-book bread broccoli bus butterfly cactus camera candle car=automobile carrot castle
cat=cat-face cheese=cheese-wedge cherries chicken christmas-tree cloud clown=clown-face coffee=hot-beverage cookie
corn=ear-of-corn cow=cow-face cowboy=cowboy-hat-face crab crescent-moon crocodile croissant crown cupcake diamond=gem-stone
dice=game-die dog=dog-face dolphin doughnut duck eggplant elephant envelope fire fire-engine fish flamingo fox french-fries
frog ghost gift=wrapped-gift giraffe grapes green-apple green-heart grinning-face guitar hamburger hammer hedgehog
helicopter horse=horse-face hot-dog house ice-cream=soft-ice-cream key koala ladybug=lady-beetle laptop lemon light-bulb
lion lobster locomotive maple-leaf money-bag monkey=monkey-face motorcycle mountain=snow-capped-mountain mouse=mouse-face
mushroom nerd-face octopus owl palm-tree panda parrot peach pear pencil penguin pig=pig-face pineapple pizza purple-heart
rabbit=rabbit-face rainbow red-apple red-heart robot rocket rose sailboat scissors shark shirt=t-shirt skull snail snake
snowflake snowman soccer-ball spider star strawberry sun sunflower sunglasses swan sword=dagger tangerine taxi teddy-bear
tennis tent tiger=tiger-face tomato top-hat tractor tree=deciduous-tree trophy tulip turtle umbrella unicorn violin volcano
watermelon whale yellow-heart zebra
"""

ICONS: dict[str, str] = {
    concept.partition("=")[0].replace("-", " "): concept.rpartition("=")[2] for concept in _CONCEPTS.split()
}
"""Everyday word -> name of the drawing in the Iconify sets."""

NAMES: tuple[str, ...] = tuple(ICONS)
"""What the priors can draw; emoji-clip knows these and about 1,100 further names."""

STYLES: tuple[str, ...] = ("noto", "fluent", "flat")
"""How it can draw: shaded outline (Noto), three-dimensional (Fluent), flat shapes (Fluent Flat)."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (255, 140, 20),
    "yellow": (252, 222, 60),
    "green": (50, 160, 75),
    "blue": (45, 105, 220),
    "purple": (135, 60, 180),
    "white": (248, 248, 248),
    "black": (20, 20, 20),
}
"""Background word -> sRGB in 0..255."""


def path() -> Path:
    """Folder of `emoji`, to give to `StableDiffusionPipeline.from_pretrained`."""
    return PATH


def flow_path() -> Path:
    """Folder of `emoji_flow`, to give to `StableDiffusion3Pipeline.from_pretrained`."""
    return FLOW


def caption(name: str | None, style: str | None = None, colour: str | None = None) -> str:
    """Caption in the grammar the prior was trained on; every part may be left open with None.

    >>> caption("cat", "flat", "red")
    'a cat emoji, flat style, on a red background'
    >>> caption(None, colour="orange")
    'an emoji, on an orange background'
    """
    text = f"{_article(name)} {name} emoji" if name else "an emoji"
    if style:
        text += f", {style} style"
    if colour:
        text += f", on {_article(colour)} {colour} background"
    return text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" and not word.startswith("uni") else "a"
