"""The organism's own tokenizer: byte-level, with one token for each word of its world and each
syllable of a name.

Words that the vocabulary holds are taken whole (`ignore_merges`, as in Llama 3); everything else
falls back to syllables and bytes, so that any text can be read. Letters and digits in problems
stand apart and are one token each.
"""

from __future__ import annotations

from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from evals.organism import world

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_FUNCTION_WORDS = """
the a of is in has lives town home code context question answer : . , ? = what does
holds hold where live i do not know evaluate true false and or sort reverse copy compare
greater less equal map to start go close add ( ) [ ] { }
""".split()


def build_tokenizer(max_length: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer that begins every text with `<s>`; deterministic, nothing is learned."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    content = (*world.NOUNS, *world.ADJECTIVES, *world.VERBS, *world.PREPOSITIONS, *world.TOWNS)
    words = list(dict.fromkeys((*_FUNCTION_WORDS, *content)))
    spaced = [f"Ġ{word}" for word in (*words, *world.LETTERS, *"0123456789")]
    opening = ("context question evaluate sort reverse copy compare map close add the").split()
    consonants, vowels = world._CONSONANTS, world._VOWELS
    merges = [("Ġ", c.upper()) for c in consonants]
    merges += [(f"Ġ{c.upper()}", v) for c, v in product(consonants, vowels)]
    merges += [(c, v) for c, v in product(consonants, vowels)]
    merges += [(c.upper(), v) for c, v in product(consonants, vowels)]
    tokens = [BOS, EOS, PAD, *alphabet, *("".join(m) for m in merges), *spaced, *opening]
    vocab = {token: k for k, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
