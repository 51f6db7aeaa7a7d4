"""The float32 reference of greedy decoding: one forward pass on the CPU over the prompt and what an engine
generated."""

import torch
from transformers import AutoModelForCausalLM

from study.sections.inference.engines.engine import usable_cores

# Every position must choose the reference's best token, or one whose reference logit is at most this many standard
# deviations (of the position's logits over the vocabulary) below it. bf16 decoding of 28 layers errs by about 0.1;
# among 150 000 tokens only a handful lie within 0.25 of the best, so a token chosen from a wrong logit vector does not
# pass.
TOLERANCE = 0.25


class Reference:
    """The checkpoint in float32 on the CPU: far from every kernel, cache and graph under test."""

    def __init__(self, path: str):
        torch.set_num_threads(len(usable_cores()))
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.vocab_size = self.model.config.vocab_size

    @torch.no_grad()
    def gap(self, prompt: list[int], new_tokens: list[int]) -> float:
        """How far the worst of `new_tokens` lies below the reference's choice at its position, in standard deviations.

        Each position is judged given the tokens the engine itself chose before it, so a near-tie decided otherwise
        earlier does not count as an error later. Infinite for a token outside the vocabulary.
        """
        if not all(0 <= token < self.vocab_size for token in new_tokens):
            return float("inf")
        sequence = torch.tensor([prompt + new_tokens[:-1]])
        logits = self.model(sequence, logits_to_keep=len(new_tokens)).logits[0]
        chosen = logits.gather(1, torch.tensor(new_tokens)[:, None])[:, 0]
        return ((logits.amax(1) - chosen) / logits.std(1)).max().item()
