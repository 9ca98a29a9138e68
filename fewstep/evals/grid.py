"""Labelled grids of images, for the README's picture and for samples during training."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER, EMPTY = (32, 34, 38), (255, 255, 255), (240, 241, 243)
GAP, MARGIN = 6, 14
LABEL_WIDTH = 210
LINE = 1.25


def grid(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    scale: int = 4,
    font_size: int = 14,
) -> Image.Image:
    """Images in rows and columns on white, enlarged `scale` times without blur.

    Labels wrap; a row label that is longer than its row is cut with an ellipsis. None leaves a
    grey cell.
    """
    assert rows and any(rows), "a grid needs an image"
    assert not row_labels or len(row_labels) == len(rows)
    columns = max(len(row) for row in rows)
    assert not column_labels or len(column_labels) == columns
    cells = [[None if image is None else _enlarge(image, scale) for image in row] for row in rows]
    present = [image for row in cells for image in row if image is not None]
    assert present, "a grid needs an image"
    width = max(image.width for image in present)
    height = max(image.height for image in present)

    font = ImageFont.load_default(font_size)
    line = round(font_size * LINE)
    heads = [_wrap(text, font, width, limit=4) for text in column_labels]
    head = max((len(lines) for lines in heads), default=0) * line
    sides = [_wrap(text, font, LABEL_WIDTH, limit=max(1, height // line)) for text in row_labels]
    side = max((_width(text, font) for lines in sides for text in lines), default=0)
    left = MARGIN + (side + 2 * GAP if side else 0)
    top = MARGIN + (head + GAP if head else 0)
    canvas = Image.new(
        "RGB",
        (
            left + columns * (width + GAP) - GAP + MARGIN,
            top + len(rows) * (height + GAP) - GAP + MARGIN,
        ),
        PAPER,
    )
    draw = ImageDraw.Draw(canvas)
    for j, lines in enumerate(heads):
        x = left + j * (width + GAP) + width / 2
        for i, text in enumerate(lines):
            y = MARGIN + head - (len(lines) - i) * line
            draw.text((x, y), text, fill=INK, font=font, anchor="ma")
    for i, lines in enumerate(sides):
        y = top + i * (height + GAP) + (height - len(lines) * line) / 2
        for n, text in enumerate(lines):
            draw.text((MARGIN + side, y + n * line), text, fill=INK, font=font, anchor="ra")
    for i, row in enumerate(cells):
        for j, image in enumerate(row):
            corner = (left + j * (width + GAP), top + i * (height + GAP))
            if image is None:
                canvas.paste(EMPTY, (*corner, corner[0] + width, corner[1] + height))
            else:
                canvas.paste(image, corner)
    return canvas


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with transparency over white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return image.convert("RGB")


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    image = on_white(image)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _width(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return round(font.getlength(text) + 0.5)


def _wrap(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, *, limit: int
) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _width(joined, font) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > limit:
        lines = [*lines[: limit - 1], f"{lines[limit - 1]} …"]
    for i, text_line in enumerate(lines):
        while _width(text_line, font) > width and len(text_line) > 1:
            text_line = text_line.rstrip("… ")[:-1] + "…"
        lines[i] = text_line
    return lines
