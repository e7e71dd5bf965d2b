"""That a video is synthetic: words in its frames, and a statement in its file."""

import struct
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from teachers.errors import UserError

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""Of IPTC's vocabulary of digital source types: made by a model."""
COMMENT = "AI-generated: made by a model (avatar-distill)"
XMP = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
"""The uuid box of an mp4 that holds XMP (ISO 16684-3)."""
PACKET = f"""<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}" xmp:CreatorTool="avatar-distill"/>
</rdf:RDF></x:xmpmeta>
<?xpacket end="r"?>
"""
SMALLEST, SMALL = 7, 10  # pixels of letters: where a line must be, and where small frames have room


class Mark:
    """Words in the lower left corner of frames, white on grey that lets the picture through; UserError where they do not fit."""

    def __init__(self, text: str, height: int, width: int):
        size = max(SMALL, height // 16)
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(text)
        while right - left + 4 > width and size > SMALLEST:
            size -= 1
            font = ImageFont.load_default(size)
            left, top, right, bottom = font.getbbox(text)
        across, down = round(right - left) + 4, round(bottom - top) + 4
        if across > width or down > height:
            raise UserError(f"--mark: '{text[:40]}' is {across} pixels wide, frames are {width}; give fewer words")
        letters = Image.new("L", (across, down), 0)
        ImageDraw.Draw(letters).text((2 - left, 2 - top), text, fill=255, font=font)
        # thin ones are grey
        self.letters = torch.from_numpy(np.array(letters).astype(np.int32) * 3 // 2)[..., None].clamp(max=255)
        self.height, self.width = down, across

    def __call__(self, frames: Tensor) -> Tensor:
        """A copy of uint8 frames [.., H, W, 3] with the words."""
        marked = frames.clone()
        corner = marked[..., -self.height :, : self.width, :]
        dark = corner.to(torch.int32) // 2
        corner.copy_((dark + (255 - dark) * self.letters // 255).to(torch.uint8))
        return marked


def state_synthetic(path: Path) -> None:
    """Append the statement to an mp4: an XMP packet with IPTC's digital source type. It is not signed, and who copies the video may
    lose it."""
    content = XMP + PACKET.encode()
    with path.open("ab") as file:
        file.write(struct.pack(">I4s", 8 + len(content), b"uuid") + content)
