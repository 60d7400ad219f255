from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from diffseg.diffusion.embeddings import Conditioning, load_conditioning, save_conditioning


def every_field(prompts: int = 3) -> Conditioning:
    return Conditioning(
        embeds=torch.randn(prompts, 7, 4),
        pooled=torch.randn(prompts, 5),
        times=torch.randn(2, 6),
        mask=torch.arange(7).expand(prompts, -1) < 4,
        embeds_2=torch.randn(prompts, 3, 8),
        mask_2=torch.ones(prompts, 3, dtype=torch.long),
        labels=torch.arange(prompts),
    )


def test_every_field_has_rows():
    encoded = every_field()
    batch = encoded.rows([2, 0], dtype=torch.bfloat16)
    assert list(batch) == ['embeds', 'pooled', 'times', 'mask', 'embeds_2', 'mask_2', 'labels']
    for name, x in encoded.by_name.items():
        chosen = batch[name]
        assert chosen.dtype == (torch.bfloat16 if x.is_floating_point() else x.dtype)
        expected = x.expand(2, -1, -1) if name == 'times' else x[[2, 0]]
        assert torch.equal(chosen, expected.to(chosen.dtype))
    assert len(encoded.tensors) == 7
    first = encoded.first()
    assert torch.equal(first.times, encoded.times)
    assert all(len(x) == 1 for name, x in first.by_name.items() if name != 'times') and len(first.tensors) == 7
    half = encoded.to(dtype=torch.float16)
    assert half.embeds_2.dtype == torch.float16 and half.mask.dtype == torch.bool and half.labels.dtype == torch.int64


def test_labels_without_tokens():
    encoded = Conditioning(torch.empty(2, 0, 0), labels=torch.tensor([3, 1000]))
    batch = encoded.rows(torch.tensor([1, 1, 0]))
    assert batch['labels'].tolist() == [1000, 1000, 3] and batch['embeds'].shape == (3, 0, 0)
    assert set(batch) == {'embeds', 'labels'} and encoded.unet_kwargs([1], (8, 8)) == {}


@pytest.mark.parametrize(
    'encoded',
    [
        every_field(),
        Conditioning(torch.randn(1, 4, 8, dtype=torch.bfloat16)),
        Conditioning(torch.empty(2, 0, 0), labels=torch.tensor([3, 1000])),
    ],
)
def test_files_hold_what_was_saved(encoded, tmp_path):
    save_conditioning(tmp_path / 'new' / 'prompts.safetensors', encoded)
    loaded = load_conditioning(tmp_path / 'new' / 'prompts.safetensors')
    assert loaded.by_name.keys() == encoded.by_name.keys()
    for name, x in encoded.by_name.items():
        assert loaded.by_name[name].dtype == x.dtype and torch.equal(loaded.by_name[name], x)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'embeds': None}, r'no tensor embeds; the tensors are embeds \(P, N, D\), pooled'),
        ({'prompt_embeds': torch.zeros(3, 5)}, r'unknown tensors prompt_embeds; the tensors are embeds'),
        ({'embeds': torch.zeros(7, 4)}, r'embeds in .* has shape \(7, 4\); it is \(P, N, D\)'),
        ({'pooled': torch.zeros(2, 5)}, r'pooled in .* has shape \(2, 5\); it is \(P, D2\) with P = 3, N = 7, D = 4'),
        ({'mask': torch.ones(3, 6, dtype=torch.bool)}, r'mask in .* has shape \(3, 6\)'),
        ({'mask': torch.ones(3, 7)}, r'mask in .* has dtype torch.float32; masks are bool or integers'),
        ({'mask': torch.full((3, 7), 2)}, r'mask in .* has values other than 0 and 1'),
        ({'embeds_2': None}, r'mask_2 without embeds_2'),
        ({'labels': torch.zeros(3, dtype=torch.int32)}, r'labels are int64'),
        ({'labels': torch.tensor([0, -1, 2])}, r'negative labels'),
        ({'embeds': torch.zeros(3, 7, 4, dtype=torch.long)}, r'embeddings are floating-point numbers'),
        ({'embeds_2': torch.full((3, 3, 8), torch.nan)}, r'embeds_2 in .* has NaN or infinite values'),
    ],
)
def test_files_with_other_tensors_are_refused(change, message, tmp_path):
    tensors = {name: x for name, x in {**every_field().by_name, **change}.items() if x is not None}
    save_file(tensors, tmp_path / 'prompts.safetensors')
    with pytest.raises(ValueError, match=message):
        load_conditioning(tmp_path / 'prompts.safetensors')


def test_no_prompt_missing_and_damaged_files(tmp_path):
    path = tmp_path / 'prompts.safetensors'
    with pytest.raises(FileNotFoundError, match=r'no file of embeddings at .*write one with save_conditioning'):
        load_conditioning(path)
    with pytest.raises(ValueError, match='are of no prompt'):
        save_conditioning(path, every_field(0))
    with pytest.raises(ValueError, match='pooled in'):
        save_conditioning(path, replace(every_field(), pooled=torch.zeros(1, 5)))
    assert not path.exists()
    save_conditioning(path, every_field())
    whole = path.read_bytes()
    for damaged in (b'', whole[:-7], b'x' * 100):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match='truncated or not a safetensors file'):
            load_conditioning(path)
    torch.save(every_field().by_name, path)
    with pytest.raises(OSError, match='not a safetensors file'):
        load_conditioning(path)
