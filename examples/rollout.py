"""Reinforcement learning in one process: minisgl draws, torch learns, minisgl gets the new weights.

    python examples/rollout.py MODEL_FOLDER        (needs torch and transformers)

The reward is a toy's: the share of an output's tokens that are even numbers.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from minisgl import LLM, SamplingParams

PROMPTS = [[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]]
SAMPLES, STEPS = 8, 10


def reward(token_ids: list[int]) -> float:
    return sum(token % 2 == 0 for token in token_ids) / len(token_ids)


def log_probability(policy: torch.nn.Module, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    logits = policy(torch.tensor([prompt + token_ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(token_ids)[:, None]).sum()


def main() -> None:
    model = sys.argv[1]
    llm = LLM(model, max_model_len=512, generation_config="none")
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    params = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, logprobs=0)
    for step in range(STEPS):
        outputs = [output.outputs[0] for output in llm.generate(PROMPTS * SAMPLES, params, use_tqdm=False)]
        rewards = torch.tensor([reward(output.token_ids) for output in outputs])
        drawn = torch.tensor([output.cumulative_logprob for output in outputs])
        learned = [log_probability(policy, prompt, output.token_ids) for prompt, output in zip(PROMPTS * SAMPLES, outputs)]
        ratio = (torch.stack(learned) - drawn).exp()  # 1, but for rounding: both are the same policy.
        loss = -(ratio * (rewards - rewards.mean())).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        llm.update_weights((name, weight.detach()) for name, weight in policy.named_parameters())
        print(f"step {step}: reward {rewards.mean():.3f}, ratio {ratio.mean():.3f}", flush=True)


if __name__ == "__main__":
    main()
