"""A second world, on which nothing was tuned: letters in the place of shapes. Pictures to train on, and those
of `val`, have one family of the text fonts that matplotlib ships; `questions` and `describe` two others.
"""

import random
from functools import partial

from PIL import ImageDraw, ImageFont

from lab import world

LETTERS = list("ABCD")  # the first ones, as many as there are shapes; the skill "shape" is to read one
DEJAVU = {"Sans": "Oblique", "SansMono": "Oblique", "Serif": "Italic"}  # what its slanted styles are called
FONTS = [f"DejaVu{family}{style}" for family, slanted in DEJAVU.items()
         for style in ("", f"-{slanted}", "-Bold", f"-Bold{slanted}")]
TEST_FONTS = ["STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta",
              "cmr10", "cmti10", "cmb10", "cmss10", "cmtt10"]


def draw_letter(fonts: list[str], pen: ImageDraw.ImageDraw, letter: str, x: int, y: int, s: int,
                fill: tuple[int, ...], rng: random.Random) -> None:
    """Draw a letter in any of the fonts, its longer side about s pixels, its corner at (x, y)."""
    from matplotlib import get_data_path

    path = f"{get_data_path()}/fonts/ttf/{rng.choice(fonts)}.ttf"
    left, top, right, bottom = ImageFont.truetype(path, 100).getbbox(letter)
    font = ImageFont.truetype(path, 100 * s // max(right - left, bottom - top))
    left, top, *_ = font.getbbox(letter)
    pen.text((x - left, y - top), letter, fill, font)


THINGS = world.Things("letter", LETTERS, partial(draw_letter, FONTS), partial(draw_letter, TEST_FONTS))
write_world = partial(world.write_world, things=THINGS)
