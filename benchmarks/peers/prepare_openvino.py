"""A model folder as OpenVINO reads it, weights as they are.

python prepare_openvino.py MODEL TARGET
"""

from __future__ import annotations

import sys
from pathlib import Path

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

model, target = map(Path, sys.argv[1:])
OVModelForCausalLM.from_pretrained(model, export=True, compile=False, load_in_8bit=False).save_pretrained(target)
# the pipeline insists on a tokenizer; requests are token ids, so any will do
bytes_alone = Tokenizer(models.BPE())
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_alone.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
bytes_alone.train_from_iterator(["a word or two"], trainer)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=bytes_alone, eos_token="<end>", bos_token="<end>", pad_token="<end>"
)
encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
openvino.save_model(encoder, target / "openvino_tokenizer.xml")
openvino.save_model(decoder, target / "openvino_detokenizer.xml")
