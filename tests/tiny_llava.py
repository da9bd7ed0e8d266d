"""A vision-language model of a few thousand parameters, in the published layout."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
WORDS = tuple(f"word{number}" for number in range(50))


def tiny_parts():
    """Tokenizer, and sizes of vision and text models of a few thousand parameters, which are made next."""
    torch.manual_seed(0)
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, additional_special_tokens=["<image>"], **names)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return tokenizer, {"vision_config": vision.to_dict(), "text_config": text.to_dict(), "image_token_index": 4}


def save(model, processor, folder):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # as initialised, a model says the same of every picture
                parameter.normal_(0, 0.5)
    # Published settings that say nothing about sampling stay in force: here, at least one word and no special tokens.
    model.generation_config.update(begin_suppress_tokens=[2], suppress_tokens=[0, 1, 3, 4])
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_llava(folder: Path) -> Path:
    """LLaVA-1.5's architecture and processor, without a chat template."""
    tokenizer, sizes = tiny_parts()
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = transformers.LlavaConfig(**sizes, image_seq_length=4)
    return save(transformers.LlavaForConditionalGeneration(config), processor, folder)
