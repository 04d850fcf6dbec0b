"""Grapheme to phoneme with a GRU encoder and decoder (Kyubyong/g2p), its calibration words and metrics.

Checkpoint `g2p/g2p_gru.safetensors`: its flat names (`enc_w_ih`, ...) are kept, so the parameters are registered under
them and the recurrences are calls of torch.gru. Of the 3000 words, those of 5 to 9 letters among the first 1000 are for
calibration, those of up to 9 letters among the other 2000 for the metric.

torch.export (2.13) fixes the length of a recurrence, so both inputs have fixed widths: 10 letters, 12 phonemes. What
stands behind the end of a word changes nothing before it: the metric puts PAD there, and calibration the word again, so
that its statistics are of letters and phonemes. The module itself takes any width, and `rates_all` uses wider ones.
"""

from __future__ import annotations

import itertools
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, GRAPHEMES, PHONEMES = 256, 29, 74
PAD, WORD_END, START, STOP = 0, 2, 2, 3  # letters end with 2; phonemes start with 2 and stop with 3
LONGEST = 9  # letters of a word
STEPS = 12  # phonemes decoded at most
CALIBRATION_WORDS = 1000
CALIBRATION_LETTERS = range(5, LONGEST + 1)
CALIBRATION_BATCH = 32
METRIC_BATCH = 250

Words = list[tuple[str, list[list[str]]]]


class G2P(nn.Module):
    """Logits [batch, m, 74] of the phoneme after each of `phonemes` [batch, m], for the words `letters` [batch, n].

    Both inputs are int64. Letters end with WORD_END; phonemes begin with START (teacher forcing).
    """

    def __init__(self) -> None:
        super().__init__()
        for side, vocabulary in (("enc", GRAPHEMES), ("dec", PHONEMES)):
            self.register_parameter(f"{side}_emb", _parameter(vocabulary, WIDTH))
            self.register_parameter(f"{side}_w_ih", _parameter(3 * WIDTH, WIDTH))
            self.register_parameter(f"{side}_w_hh", _parameter(3 * WIDTH, WIDTH))
            self.register_parameter(f"{side}_b_ih", _parameter(3 * WIDTH))
            self.register_parameter(f"{side}_b_hh", _parameter(3 * WIDTH))
        self.fc_w, self.fc_b = _parameter(PHONEMES, WIDTH), _parameter(PHONEMES)

    def forward(self, letters: Tensor, phonemes: Tensor) -> Tensor:
        x = F.embedding(letters, self.enc_emb)
        start = x.new_zeros(1, x.shape[0], self.enc_w_hh.shape[1])
        encoder = [self.enc_w_ih, self.enc_w_hh, self.enc_b_ih, self.enc_b_hh]
        states, _ = torch.gru(x, start, encoder, True, 1, 0.0, False, False, True)
        last = (states * (letters == WORD_END).unsqueeze(2)).sum(1)  # the state where the word ends
        decoder = [self.dec_w_ih, self.dec_w_hh, self.dec_b_ih, self.dec_b_hh]
        x = F.embedding(phonemes, self.dec_emb)
        y, _ = torch.gru(x, last.unsqueeze(0), decoder, True, 1, 0.0, False, False, True)
        return F.linear(y, self.fc_w, self.fc_b)


def g2p() -> nn.Module:
    return G2P()


def calibration(samples: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Draw calibration words of 5 to 9 letters, teacher forced with their first pronunciation, in batches of 32."""
    pool = [word for word in _words()[:CALIBRATION_WORDS] if len(word[0]) in CALIBRATION_LETTERS]
    drawn = [pool[i] for i in _data().draw(len(pool), samples, seed)]
    index = {phoneme: i for i, phoneme in enumerate(_phonemes())}
    letters = torch.tensor([_repeated(_letters(word), LONGEST + 1) for word, _ in drawn])
    said = torch.tensor([_repeated([START, *(index[p] for p in accepted[0])], STEPS) for _, accepted in drawn])
    return list(zip(letters.split(CALIBRATION_BATCH), said.split(CALIBRATION_BATCH), strict=True))


def accuracy(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> npt.NDArray[np.float64]:
    """Score 1 - phoneme error rate (may be negative) for each word of up to 9 letters after the first 1000 words."""
    words = [word for word in _words()[CALIBRATION_WORDS:] if len(word[0]) <= LONGEST]
    errors, phonemes = phoneme_errors(model, words, LONGEST, STEPS)
    return 1 - errors / phonemes


def rates_all(model: Callable[..., Tensor | tuple[Tensor, ...]]) -> tuple[float, float]:
    """Return the phoneme and the word error rate over all 3000 words: the README's figures.

    It calls the model with wider inputs than calibration and metric do, so it is for the module, not for an export.
    """
    errors, phonemes = phoneme_errors(model, _words(), longest=14, steps=20)
    return float(errors.sum() / phonemes.sum()), float((errors > 0).mean())


def phoneme_errors(
    model: Callable[..., Tensor | tuple[Tensor, ...]], words: Words, longest: int, steps: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return each word's edit distance to the nearest accepted pronunciation, and that pronunciation's length."""
    names = _phonemes()
    letters = torch.tensor([_letters(word) + [PAD] * (longest - len(word)) for word, _ in words])
    spoken = itertools.chain.from_iterable(greedy(model, part, steps) for part in letters.split(METRIC_BATCH))
    nearest = []
    for codes, (_, accepted) in zip(spoken, words, strict=True):
        said = [names[code] for code in codes]
        nearest.append(min((edit_distance(said, wanted), len(wanted)) for wanted in accepted))
    errors, phonemes = np.array(nearest, dtype=np.float64).T
    return errors, phonemes


@torch.no_grad()
def greedy(model: Callable[..., Tensor | tuple[Tensor, ...]], letters: Tensor, steps: int) -> list[list[int]]:
    """Decode one phoneme per call of the model, until every word of the batch has stopped."""
    said = torch.full((len(letters), steps + 1), PAD)
    said[:, 0] = START
    for i in range(steps):
        said[:, i + 1] = _first(model(letters, said[:, :steps].contiguous()))[:, i].argmax(1)
        if bool((said == STOP).any(1).all()):
            break
    return [list(itertools.takewhile(lambda code: code not in (STOP, PAD), row)) for row in said[:, 1:].tolist()]


def edit_distance(said: list[str], wanted: list[str]) -> int:
    """Return the Levenshtein distance."""
    row = list(range(len(wanted) + 1))
    for i, phoneme in enumerate(said, start=1):
        above, row = row, [i]
        for j, other in enumerate(wanted, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (phoneme != other)))
    return row[-1]


def _letters(word: str) -> list[int]:
    return [ord(letter) - ord("a") + 3 for letter in word] + [WORD_END]


def _repeated(codes: list[int], width: int) -> list[int]:
    return list(itertools.islice(itertools.cycle(codes), width))


def _words() -> Words:
    return list(json.loads((_data().folder() / "g2p/cmudict_words_3000.json").read_text()).items())


def _phonemes() -> list[str]:
    return json.loads((_data().folder() / "g2p/vocab.json").read_text())["phonemes"]


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) / WIDTH**0.5)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _data() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("data.py"))))
