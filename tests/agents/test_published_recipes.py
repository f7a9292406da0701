"""The published recipes: every published constant by name, and that each recipe composes into a run that could begin.

Sources: Search-R1 is PeterGriffinJin/Search-R1 at a14dc3a (scripts/nq_hotpotqa/v0.*, and its ppo_trainer.yaml), R1-Searcher RUCAIBox/R1-Searcher at
631167c, ZeroSearch Alibaba-NLP/ZeroSearch at 2d4cdca; papers arXiv 2503.09516, 2503.05592, 2505.04588.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf, flag_override

import searchqa_conf
from searchqa_agents.cli import main
from searchqa_agents.config_help import options
from searchqa_agents.loading import missing_data
from searchqa_agents.plan import COLLECTION_ROWS, addresses, make_plan
from searchqa_agents.select_command import SelectSettings
from searchqa_agents.settings import TrainSettings, changed_arguments, env_arguments, register, register_training, with_parts
from searchqa_agents.simulator_command import SimulatorTrainSettings
from searchqa_agents.stages import stages_of
from searchqa_envs.configuration import build_rules
from searchqa_envs.datasets import DATASETS
from searchqa_envs.datasets.registry import COLLECTIONS, QUESTION_COLLECTIONS
from searchqa_envs.rewards import PRESETS

FOLDER = Path(searchqa_conf.__file__).parent / "recipe" / "published"
RECIPES = options("recipe/published")
MODELS = [name for name in options("llm") if name != "none"]
QUESTIONS = [{"id": "q", "question": "Who wrote Hamlet?", "golden_answers": ["Shakespeare"]}]


@functools.cache
def settings_of(*words: str) -> TrainSettings:
    """What `searchqa train <words>` would be run with."""
    register()
    register_training()
    with initialize_config_module("searchqa_conf", version_base="1.3"):
        config = compose("train", overrides=with_parts(words), return_hydra_config=True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(config)
    try:
        with flag_override(config, ["struct", "readonly"], False):
            del config["hydra"]
        return cast(TrainSettings, OmegaConf.to_object(config))
    finally:
        HydraConfig.instance().cfg = before


def value_of(settings: Any, key: str) -> Any:
    for name in key.split("."):
        settings = (
            settings[int(name)] if isinstance(settings, list) else settings[name] if isinstance(settings, dict) else getattr(settings, name)
        )
    return settings


SEARCH_R1 = [name for name in RECIPES if name.startswith("search_r1_")]
SEARCH_R1_PPO = [name for name in SEARCH_R1 if "_ppo" in name]
SEARCH_R1_GRPO = [name for name in SEARCH_R1 if "_grpo" in name]
LORA = ["search_r1_grpo_lora"]
SEARCH_R1_FULL = [name for name in SEARCH_R1 if name not in LORA]
ZEROSEARCH = [name for name in RECIPES if name.startswith("zerosearch_")]
ZEROSEARCH_PAPER = [name for name in ZEROSEARCH if "_paper_" in name]
ZEROSEARCH_GRPO = [name for name in ZEROSEARCH if "_grpo" in name]
ZEROSEARCH_REINFORCE = [
    name for name in ZEROSEARCH if name.startswith("zerosearch_reinforce") and "plus_plus" not in name
] + ZEROSEARCH_PAPER
R1_SEARCHER = [name for name in RECIPES if name.startswith("r1_searcher_")]
QWEN = [name for name in R1_SEARCHER if "llama" not in name]
LLAMA = [name for name in R1_SEARCHER if "llama" in name]
PAPER_STAGE_2 = ["r1_searcher_paper", "r1_searcher_paper_stage2"]
LLAMA_STAGE_2 = ["r1_searcher_llama", "r1_searcher_llama_stage2"]
PPO = [*SEARCH_R1_PPO, "zerosearch_ppo"]
GRPO = [*SEARCH_R1_GRPO, *ZEROSEARCH_GRPO]
VERL_FORKS = [*SEARCH_R1_PPO, *SEARCH_R1_GRPO, *ZEROSEARCH]

YAML = "the repository's ppo_trainer.yaml"
OPENRLHF = "the repository's openrlhf/cli/train_ppo_ray.py"
ROLLOUT = "the RAG generator in the repository's fork of OpenRLHF"

CONSTANTS: list[tuple[list[str], str, Any, str]] = [
    # Search-R1, and what ZeroSearch, its fork, has too
    (SEARCH_R1, "env.dialect", "search-r1", "search_r1/llm_agent/generation.py"),
    (SEARCH_R1 + ZEROSEARCH, "env.prompt", "published", "the one template"),
    (SEARCH_R1, "env.questions", "nq_hotpotqa_train", "the scripts: data_name"),
    (SEARCH_R1 + ZEROSEARCH, "env.split", "train", "the scripts: data.train_files"),
    (SEARCH_R1, "env.retriever", {"name": "http", "url": "http://127.0.0.1:8000", "format": "search-r1"}, "the scripts: retriever.url"),
    (SEARCH_R1, "env.top_k", 3, "the scripts: retriever.topk"),
    (SEARCH_R1, "env.max_turns", 4 + 1, "the scripts: max_turns=4, and the last round without search"),
    (SEARCH_R1 + ZEROSEARCH, "env.max_segment_tokens", 500, "the scripts: data.max_response_length"),
    (SEARCH_R1, "env.max_observation_tokens", 500, "the scripts: data.max_obs_length"),
    (SEARCH_R1 + ZEROSEARCH, "env.max_context_tokens", 4096 + 500, "the scripts: data.max_prompt_length, and one response more for vLLM"),
    (["search_r1_ppo", "search_r1_ppo_v0_1", "search_r1_ppo_paper"], "env.reward", "em", "qa_em.py"),
    (["search_r1_grpo", "search_r1_grpo_v0_1", "search_r1_grpo_paper", "search_r1_grpo_lora"], "env.reward", "em", "qa_em.py"),
    (["search_r1_ppo_v0_3", "search_r1_grpo_v0_3"], "env.reward.name", "search_r1_format", "qa_em_format.py"),
    (["search_r1_ppo_v0_3", "search_r1_grpo_v0_3"], "env.reward.structure_score", 0.2, "v0.3: reward_model.structure_format_score"),
    (["search_r1_ppo_v0_3", "search_r1_grpo_v0_3"], "env.reward.final_score", 0.1, "v0.3: reward_model.final_format_score"),
    (["search_r1_ppo_v0_3", "search_r1_grpo_v0_3"], "env.reward.retrieval_score", 0, "v0.3: reward_model.retrieval_score"),
    (SEARCH_R1, "evaluation.split", "test", "the scripts: data.val_files"),
    (
        ["search_r1_ppo", "search_r1_ppo_v0_3", "search_r1_grpo", "search_r1_grpo_v0_3", *LORA],
        "algo.steps",
        1005,
        "v0.2, v0.3: total_training_steps",
    ),
    (["search_r1_ppo_v0_1", "search_r1_grpo_v0_1"], "algo.steps", 305, "v0.1: trainer.total_training_steps"),
    (["search_r1_ppo_paper", "search_r1_grpo_paper"], "algo.steps", 500, "paper"),
    (SEARCH_R1_FULL, "algo.questions_per_step", 512, "the scripts: data.train_batch_size"),
    (SEARCH_R1_PPO, "algo.group_size", 1, "the scripts: rollout.n_agent"),
    (SEARCH_R1_GRPO, "algo.group_size", 5, "the scripts: rollout.n_agent"),
    (SEARCH_R1_PPO, "algo.num_minibatches", 512 // 256, "the scripts: actor.ppo_mini_batch_size=256 sequences"),
    (SEARCH_R1_GRPO, "algo.num_minibatches", 512 * 5 // 256, "the scripts: actor.ppo_mini_batch_size=256 sequences"),
    (SEARCH_R1_FULL, "algo.checkpoint_every", 100, "the scripts: trainer.save_freq"),
    (["search_r1_ppo", "search_r1_ppo_v0_3", "search_r1_ppo_paper"], "algo.top_p", 1.0, "v0.2, v0.3: rollout.top_p"),
    (["search_r1_ppo_v0_1", *SEARCH_R1_GRPO, *ZEROSEARCH], "algo.top_p", 0.95, YAML),
    (VERL_FORKS, "algo.top_k", 0, YAML),
    (VERL_FORKS, "algo.temperature", 1, "the scripts: rollout.temperature"),
    ([n for n in VERL_FORKS if n not in ("search_r1_grpo_v0_3", *LORA)], "algo.learning_rate", 1e-6, "the scripts: actor.optim.lr"),
    (["search_r1_grpo_v0_3"], "algo.learning_rate", 5e-7, "v0.3 GRPO: actor.optim.lr"),
    ([n for n in SEARCH_R1 if "v0_1" not in n], "algo.warmup_ratio", 0.285, "v0.2, v0.3: actor.optim.lr_warmup_steps_ratio"),
    (["zerosearch_ppo"], "algo.warmup_ratio", 0.285, "train_ppo.sh"),
    (["search_r1_ppo_v0_1", "search_r1_grpo_v0_1"], "algo.warmup_ratio", 0.95, "v0.1: actor.optim.lr_warmup_steps_ratio"),
    (ZEROSEARCH_GRPO + ZEROSEARCH_REINFORCE, "algo.warmup_ratio", 0.95, "train_grpo.sh, train_reinforce.sh"),
    (VERL_FORKS, "algo.schedule", "constant", YAML),
    (VERL_FORKS, "algo.beta1", 0.9, "torch.optim.AdamW"),
    (VERL_FORKS, "algo.beta2", 0.999, "torch.optim.AdamW"),
    (VERL_FORKS, "algo.weight_decay", 0.01, "torch.optim.AdamW"),
    (VERL_FORKS, "algo.max_grad_norm", 1.0, YAML),
    (VERL_FORKS, "algo.clip_coef", 0.2, YAML),
    (VERL_FORKS, "algo.entropy_coef", 0.001, YAML),
    ([n for n in VERL_FORKS if not n.endswith("_code")], "algo.kl_coef", 0.001, "the scripts: kl_loss_coef, kl_coef"),
    (VERL_FORKS, "algo.mask_environment", True, "the scripts: actor.state_masking"),
    (VERL_FORKS, "algo.update_epochs", 1, YAML),
    (VERL_FORKS, "algo.token_weighting", "token-mean", "the yaml's worker: masked_mean"),
    (SEARCH_R1, "evaluation.questions", 1000, "ours"),
    (LORA, "start", "Qwen/Qwen2.5-3B", "ours"),
    (LORA, "dtype", "bfloat16", "ours"),
    (LORA, "parallel", "auto", "ours"),
    (LORA, "lora", {"rank": 32, "alpha": 64, "target_modules": "all-linear"}, "ours"),
    (LORA, "algo.questions_per_step", 512 // 8, "ours: an eighth"),
    (LORA, "algo.learning_rate", 1e-5, "ours"),
    (LORA, "algo.checkpoint_every", 25, "ours"),
    (PPO, "algo.name", "ppo", "train_ppo.sh: algorithm.adv_estimator=gae"),
    (PPO, "algo.critic", "separate", "train_ppo.sh: critic.model.path"),
    (PPO, "algo.gamma", 1, YAML),
    (PPO, "algo.lam", 1, YAML),
    (PPO, "algo.whiten", True, "core_algos.py: masked_whiten of GAE"),
    (PPO, "algo.environment_tokens", True, "GAE, whitening and the critic's loss are over the attention mask"),
    (PPO, "algo.value_clip_coef", 0.5, YAML),
    (PPO, "algo.critic_learning_rate", 1e-5, "train_ppo.sh: critic.optim.lr"),
    ([n for n in PPO if "v0_1" not in n], "algo.critic_warmup_ratio", 0.015, "train_ppo.sh: critic.optim.lr_warmup_steps_ratio"),
    (["search_r1_ppo_v0_1"], "algo.critic_warmup_ratio", 0.05, "v0.1: critic.optim.lr_warmup_steps_ratio"),
    (PPO, "algo.critic_warmup", 0, "train_ppo.sh: trainer.critic_warmup"),
    (PPO, "algo.kl_in", "reward", "no use_kl_loss in train_ppo.sh"),
    (PPO, "algo.kl_estimator", "k1", YAML),
    (PPO, "algo.kl_clamp", None, "core_algos.py"),
    (GRPO, "algo.name", "grpo", "train_grpo.sh: algorithm.adv_estimator"),
    (GRPO, "algo.normalise_std", True, "core_algos.py"),
    (GRPO + ZEROSEARCH_REINFORCE, "algo.kl_in", "loss", "the scripts: actor.use_kl_loss"),
    (GRPO + ZEROSEARCH_REINFORCE, "algo.kl_estimator", "k3", "the scripts: actor.kl_loss_type=low_var_kl"),
    (GRPO + ZEROSEARCH_REINFORCE, "algo.kl_clamp", 10, "core_algos.py"),
    # ZeroSearch
    (ZEROSEARCH_REINFORCE, "algo.name", "reinforce", "train_reinforce.sh: algorithm.adv_estimator"),
    (["zerosearch_reinforce_plus_plus"], "algo.name", "reinforce_plus_plus", "paper v1"),
    (["zerosearch_reinforce_plus_plus"], "algo.warmup_ratio", 0.95, "train_grpo.sh, train_reinforce.sh"),
    (["zerosearch_reinforce_plus_plus"], "algo.kl_in", "reward", "arXiv 2501.03262"),
    (["zerosearch_reinforce_plus_plus"], "algo.kl_estimator", "k1", "arXiv 2501.03262"),
    (["zerosearch_reinforce_plus_plus"], "algo.kl_clamp", None, "arXiv 2501.03262"),
    (ZEROSEARCH_REINFORCE, "algo.gamma", 1, YAML),
    (ZEROSEARCH, "env.dialect", "zerosearch", "llm_agent/generation.py"),
    (ZEROSEARCH, "env.questions", "zerosearch", "README: ZeroSearch_dataset"),
    (ZEROSEARCH, "env.reward", "zerosearch_f1", "the scripts: trainer.reward_function=f1"),
    (ZEROSEARCH, "env.top_k", 5, YAML),
    (ZEROSEARCH, "env.max_observation_tokens", 2048, "data.max_obs_length"),
    ([n for n in ZEROSEARCH if n not in ZEROSEARCH_PAPER], "env.max_turns", 5 + 1, "README, and the last round"),
    (ZEROSEARCH_PAPER, "env.max_turns", 2 + 1, "issue 29 on the reported runs, and the last round"),
    (ZEROSEARCH, "env.retriever.name", "simulated", "README: SEARCH_MODE simulate_sft"),
    (ZEROSEARCH, "env.retriever.prompt", "sft", "README: SEARCH_MODE simulate_sft"),
    (ZEROSEARCH, "env.retriever.url", "http://localhost:6001", "README: IP localhost, --port 6001"),
    (ZEROSEARCH, "env.retriever.temperature", 0.8, YAML),
    (ZEROSEARCH, "env.retriever.max_tokens", 600, "llm_agent/generation.py"),
    (ZEROSEARCH, "env.retriever.noise.base", 4, "llm_agent/generation.py"),
    ([n for n in ZEROSEARCH if n not in ZEROSEARCH_PAPER], "env.retriever.noise.start", 0, "README: START_THRESHOLD"),
    ([n for n in ZEROSEARCH if n not in ZEROSEARCH_PAPER], "env.retriever.noise.end", 0.5, "README: END_THRESHOLD"),
    (["zerosearch_paper_qwen_7b"], "env.retriever.noise.start", 0, "paper: Qwen2.5-7B"),
    (["zerosearch_paper_qwen_7b"], "env.retriever.noise.end", 0.75, "paper: Qwen2.5-7B"),
    (["zerosearch_paper_qwen_3b"], "env.retriever.noise.start", 0, "paper: Qwen2.5-3B"),
    (["zerosearch_paper_qwen_3b"], "env.retriever.noise.end", 0.25, "paper: Qwen2.5-3B"),
    (["zerosearch_paper_llama_3b"], "env.retriever.noise.start", 0.25, "paper: Llama-3.2-3B"),
    (["zerosearch_paper_llama_3b"], "env.retriever.noise.end", 0.5, "paper: Llama-3.2-3B"),
    (ZEROSEARCH, "algo.steps", 203, "README: TOTAL_STEPS"),
    (ZEROSEARCH, "algo.questions_per_step", 64, "the scripts: data.train_batch_size"),
    (ZEROSEARCH, "algo.group_size", 5, "the scripts: rollout.n_agent"),
    (ZEROSEARCH, "algo.num_minibatches", 2, "the scripts: 64 x 5 sequences, actor.ppo_mini_batch_size=256"),
    (ZEROSEARCH, "algo.checkpoint_every", 50, "the scripts: trainer.save_freq"),
    ([n for n in ZEROSEARCH if n.endswith("_code")], "algo.kl_coef", -0.001, "the sign at 2d4cdca, issue 10"),
    (ZEROSEARCH, "evaluation.questions", 6 * 500 + 125, "paper: 500 of each set, 125 of Bamboogle"),
    (ZEROSEARCH, "evaluation.split", "test", "the scripts: data.val_files"),
    (ZEROSEARCH, "evaluation.env.retriever.name", "http", "search_engine wiki"),
    (ZEROSEARCH, "evaluation.env.retriever.url", "http://127.0.0.1:6002", "the wiki server's port"),
    (ZEROSEARCH, "evaluation.env.retriever.format", "zerosearch", "POST /retrieve {query, top_k}"),
    # R1-Searcher
    (R1_SEARCHER, "env.dialect", "r1-searcher", "the fork's prompts"),
    (QWEN, "env.prompt", "published", "the fork's prompt for base models"),
    (LLAMA, "env.prompt", "chat", "the fork's prompt for instruct models"),
    (R1_SEARCHER, "env.split", "all", "the files have no splits"),
    (R1_SEARCHER, "env.retriever.name", "http", "README: train/wiki_corpus_load.py"),
    (R1_SEARCHER, "env.retriever.format", "r1-searcher", "POST /queries"),
    (R1_SEARCHER, "env.retriever.url", "http://127.0.0.1:5004", "README: train/wiki_corpus_load.py hotpotqa 5004"),
    (R1_SEARCHER, "env.top_k", 3, ROLLOUT),
    (R1_SEARCHER, "env.max_turns", 8 + 1, "8 retrievals at most, and the last segment"),
    (R1_SEARCHER, "env.max_segment_tokens", 512, ROLLOUT),
    (R1_SEARCHER, "env.max_observation_tokens", 1024, "ours"),
    (R1_SEARCHER, "env.max_context_tokens", 1024 + 9 * 512 + 8 * 1024, "ours: --prompt_max_len 1024, and all that an episode can hold"),
    (R1_SEARCHER, "algo.temperature", 1, "the scripts: TEMP"),
    (R1_SEARCHER, "algo.top_p", 0.95, ROLLOUT),
    (R1_SEARCHER, "algo.group_size", 16, "the scripts: N_SAMPLES"),
    (R1_SEARCHER, "algo.num_minibatches", 4, "the scripts: TBS = 4 x RBS, and 16 samples"),
    (R1_SEARCHER, "algo.update_epochs", 1, "the scripts: --max_epochs"),
    (R1_SEARCHER, "algo.learning_rate", 2e-6, "the scripts: LR"),
    (R1_SEARCHER, "algo.beta1", 0.9, OPENRLHF),
    (R1_SEARCHER, "algo.beta2", 0.95, OPENRLHF),
    (R1_SEARCHER, "algo.weight_decay", 0, OPENRLHF),
    (R1_SEARCHER, "algo.max_grad_norm", 1, OPENRLHF),
    (R1_SEARCHER, "algo.schedule", "cosine", "cosine_with_min_lr"),
    (R1_SEARCHER, "algo.final_fraction", 0.1, "min_lr is 0.1 of the peak"),
    (R1_SEARCHER, "algo.warmup_ratio", 0, "the scripts: WARMUP"),
    (R1_SEARCHER, "algo.clip_coef", 0.2, OPENRLHF),
    (R1_SEARCHER, "algo.reward_clip", 10, OPENRLHF),
    (R1_SEARCHER, "algo.kl_in", "reward", OPENRLHF),
    (R1_SEARCHER, "algo.kl_estimator", "k1", OPENRLHF),
    (R1_SEARCHER, "algo.kl_clamp", None, OPENRLHF),
    (R1_SEARCHER, "algo.entropy_coef", 0, "no entropy bonus"),
    (R1_SEARCHER, "algo.top_k", 0, "the RAG generator: all tokens"),
    (R1_SEARCHER, "algo.checkpoint_every", 20, "the scripts: --save_steps"),
    (R1_SEARCHER, "algo.mask_environment", True, "the document mask"),
    (R1_SEARCHER, "evaluation.questions", 500, "paper: 500 of each dev set"),
    (R1_SEARCHER, "evaluation.split", "all", "the file has no splits"),
    (R1_SEARCHER, "evaluation.env.questions", "data/eval_set/hotpotqa_500.jsonl", "README"),
    (R1_SEARCHER, "evaluation.env.top_k", 5, "evaluation/eval_search_loacl.py"),
    (QWEN, "algo.name", "reinforce_plus_plus", "the script: --advantage_estimator reinforce_baseline"),
    (QWEN + LLAMA_STAGE_2, "algo.baseline", "group", "reinforce_baseline"),
    (QWEN + LLAMA_STAGE_2, "algo.gamma", 1, OPENRLHF),
    (QWEN, "algo.questions_per_step", 64, "the script: RBS"),
    (QWEN, "algo.kl_coef", 0, "the script: KL"),
    ([*PAPER_STAGE_2, "r1_searcher_qwen"], "algo.schedule_steps", 10_000 * (8148 // 64), "the script: EPISODE, over 8,148 questions"),
    (["r1_searcher_paper_stage1"], "algo.schedule_steps", 10_000 * (350 // 64), "the script: EPISODE, over 350 questions"),
    (["r1_searcher_paper"], "stages.0.algo.schedule_steps", 10_000 * (350 // 64), "the script: EPISODE, over 350 questions"),
    ([*PAPER_STAGE_2, "r1_searcher_qwen"], "algo.steps", 8148 // 64, "ours: once through 8,148 questions"),
    (LLAMA_STAGE_2, "algo.steps", 8148 // 65, "ours: once through 8,148 questions"),
    (["r1_searcher_llama_stage1"], "algo.steps", 350 // 15, "ours: once through 350 questions"),
    (["r1_searcher_llama"], "stages.0.until", {"steps": 350 // 15}, "ours: once through 350 questions"),
    (["r1_searcher_paper_stage1"], "algo.steps", 350 // 64, "ours: once through 350 questions"),
    (["r1_searcher_paper"], "stages.0.until", {"steps": 350 // 64}, "ours: once through 350 questions"),
    (["r1_searcher_paper", "r1_searcher_llama"], "stages.0.name", "stage1", "the file's name"),
    (["r1_searcher_paper", "r1_searcher_llama"], "stages.1.name", "stage2", "the file's name"),
    (["r1_searcher_paper_stage1"], "env.questions", "data/training_set/stage_1.jsonl", "paper: 350 questions"),
    (["r1_searcher_paper"], "stages.0.env.questions", "data/training_set/stage_1.jsonl", "paper: 350 questions"),
    (PAPER_STAGE_2, "env.questions", "data/training_set/stage_2.jsonl", "paper: 8,148 questions"),
    (["r1_searcher_qwen"], "env.reward", "r1_searcher_stage2_qwen", "train/reward_server_qwen_zero.py"),
    (["r1_searcher_qwen", *LLAMA_STAGE_2], "env.questions", "data/training_set/stage_2.jsonl", "the scripts: DATA_PATH"),
    (LLAMA_STAGE_2, "env.reward", "r1_searcher_stage2_llama", "stage 2's reward server: -1"),
    (LLAMA_STAGE_2, "algo.name", "reinforce_plus_plus", "stage 2: --advantage_estimator reinforce_baseline"),
    (LLAMA_STAGE_2, "algo.questions_per_step", 65, "stage 2: RBS"),
    (["r1_searcher_llama_stage1", *LLAMA_STAGE_2], "algo.kl_coef", 1e-4, "the scripts: KL"),
    (LLAMA_STAGE_2, "algo.schedule_steps", 10_000 * (8148 // 65), "stage 2: EPISODE, over 8,148 questions"),
    (["r1_searcher_llama_stage1"], "algo.name", "grpo", "stage 1: --advantage_estimator group_norm"),
    (["r1_searcher_llama_stage1"], "algo.normalise_std", True, "stage 1: group_norm"),
    (["r1_searcher_llama_stage1"], "algo.questions_per_step", 15, "stage 1: RBS"),
    (["r1_searcher_llama_stage1"], "algo.schedule_steps", 10_000 * (350 // 15), "stage 1: EPISODE, over 350 questions"),
    (["r1_searcher_llama_stage1"], "env.reward", "r1_searcher_stage1_llama", "stage 1's reward server"),
    (["r1_searcher_llama_stage1"], "env.questions", "data/training_set/stage_1.jsonl", "stage 1: DATA_PATH"),
    (["r1_searcher_llama"], "stages.0.env.reward", "r1_searcher_stage1_llama", "stage 1's reward server"),
    (["r1_searcher_llama"], "stages.0.env.questions", "data/training_set/stage_1.jsonl", "stage 1: DATA_PATH"),
    (["r1_searcher_llama"], "stages.0.algo.name", "grpo", "stage 1: group_norm"),
    (["r1_searcher_llama"], "stages.0.algo.questions_per_step", 15, "stage 1: RBS"),
    (["r1_searcher_llama"], "stages.0.algo.schedule_steps", 10_000 * (350 // 15), "stage 1: EPISODE, over 350 questions"),
    (["r1_searcher_paper_stage1"], "env.reward", "r1_searcher_stage1", "paper: 0.5 for retrieval, 0.5 for the format"),
    (["r1_searcher_paper"], "stages.0.env.reward", "r1_searcher_stage1", "paper: 0.5 for retrieval, 0.5 for the format"),
    (["r1_searcher_paper_stage2", "r1_searcher_paper"], "env.reward.name", "r1_searcher_stage2", "paper: F1 and a penalty"),
    (["r1_searcher_paper_stage2", "r1_searcher_paper"], "env.reward.penalty", -2, "paper"),
    # models: the scripts' own
    (["search_r1_ppo", "search_r1_ppo_paper", "search_r1_grpo", "search_r1_grpo_paper"], "start", "Qwen/Qwen2.5-7B", "v0.2: BASE_MODEL"),
    (["search_r1_ppo_v0_3", "search_r1_grpo_v0_3"], "start", "Qwen/Qwen2.5-3B", "v0.3: BASE_MODEL"),
    (["search_r1_ppo_v0_1", "search_r1_grpo_v0_1"], "start", "meta-llama/Llama-3.2-3B", "v0.1: BASE_MODEL"),
    ([n for n in ZEROSEARCH if "_qwen_" not in n], "start", "meta-llama/Llama-3.2-3B", "README: MODEL_PATH"),
    (["zerosearch_paper_qwen_7b", *QWEN], "start", "Qwen/Qwen2.5-7B", "papers"),
    (["zerosearch_paper_qwen_3b"], "start", "Qwen/Qwen2.5-3B", "paper"),
    (LLAMA, "start", "meta-llama/Llama-3.1-8B-Instruct", "TOKENIZER_PATH"),
]


def flat(values: Any, key: str = "") -> Iterator[str]:
    """The keys of all leaves; a list's places are numbers."""
    rows = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    if not isinstance(values, dict | list):
        yield key
    for name, value in rows:
        yield from flat(value, f"{key}.{name}" if key else str(name))


def keys_set_in(path: Path) -> set[str]:
    """Every key that a recipe's file sets, or another of the published ones that it is made of."""
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    keys = set()
    for default in read.pop("defaults", []):
        if isinstance(default, str) and default.startswith("/recipe/published/"):
            keys |= keys_set_in(FOLDER / f"{default.removeprefix('/recipe/published/')}.yaml")
        elif isinstance(default, dict):
            keys |= {
                {"override /algo": "algo.name", "override /llm": "start", "override /env": "env.questions"}[group] for group in default
            }
    keys |= set(flat(read))
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}  # a mapping's parts stand for it


ROWS = [(recipe, key, value, source) for recipes, key, value, source in CONSTANTS for recipe in recipes]


@pytest.mark.parametrize(("recipe", "key", "value", "source"), ROWS, ids=[f"{recipe}:{key}" for recipe, key, _, _ in ROWS])
def test_a_published_constant(recipe: str, key: str, value: Any, source: str) -> None:
    assert value_of(settings_of(f"recipe=published/{recipe}"), key) == value, source


def test_no_constant_is_asserted_twice_and_every_recipe_has_some() -> None:
    named = [(recipe, key) for recipe, key, _, _ in ROWS]
    assert len(named) == len(set(named))
    assert {recipe for recipe, _ in named} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_key_that_a_recipe_sets_is_among_the_constants(recipe: str) -> None:
    asserted = {key for name, key, _, _ in ROWS if name == recipe}
    whole = tuple(f"{key}." for key in asserted)  # mappings that are asserted as one
    assert sorted(key for key in keys_set_in(FOLDER / f"{recipe}.yaml") - asserted if not key.startswith(whole)) == []


def test_the_sizes_of_the_published_data() -> None:
    train = {("nq", "train"): 79_168, ("hotpotqa", "train"): 90_447}
    test = {
        ("nq", "test"): 3610,
        ("triviaqa", "test"): 11_313,
        ("popqa", "test"): 14_267,
        ("hotpotqa", "dev"): 7405,
        ("2wikimultihopqa", "dev"): 12_576,
        ("musique", "dev"): 2417,
        ("bamboogle", "test"): 125,
    }
    for name, split in (*train, *test):
        assert DATASETS[name].sizes[split] == (train | test)[name, split]
    assert (
        COLLECTION_ROWS["nq_hotpotqa_train"]
        == {"train": sum(train.values()), "test": sum(test.values())}
        == {"train": 169_615, "test": 51_713}
    )
    assert {name: COLLECTIONS[name].repo for name in QUESTION_COLLECTIONS} == {
        "nq_hotpotqa_train": "PeterJinGo/nq_hotpotqa_train",
        "zerosearch": "sunhaonlp/ZeroSearch_dataset",
    }


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_line_of_a_recipe_names_its_source(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert re.match(r"# \S", lines[1])
    values = [line for line in lines if re.search(r":\s*[^\s#]", line.partition("#")[0]) and not line.strip().startswith("- override")]
    assert [
        line for line in values if "#" not in line and not re.match(r"\s*(- )?name:|kl_coef: -0.001|env: \{retriever: null\}", line.strip())
    ] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_its_environment(recipe: str) -> None:
    settings = settings_of(f"recipe=published/{recipe}")
    for stage in stages_of(settings):  # algorithm and settings of each are checked
        arguments = {**env_arguments(stage.env), "questions": QUESTIONS, "split": "all", "tokenizer": "byte"}
        rules = build_rules("custom", **arguments)
        env = stage.env
        assert (rules.dialect.name, rules.prompt) == (env.dialect, env.prompt)
        assert (rules.top_k, rules.max_turns) == (env.top_k, env.max_turns)
        budgets = (rules.max_segment_tokens, rules.max_observation_tokens, rules.max_context_tokens)
        assert budgets == (env.max_segment_tokens, env.max_observation_tokens, env.max_context_tokens)
        assert getattr(rules.retriever, "needs_gold", False) == recipe.startswith("zerosearch")
        assert (env.reward if isinstance(env.reward, str) else env.reward["name"]) in PRESETS
    changed = changed_arguments("evaluation.env", settings.evaluation.env, settings.env)
    measured = build_rules("custom", **{**arguments, **changed, "questions": QUESTIONS})
    assert not getattr(measured.retriever, "needs_gold", False)  # what is learned with a simulator is measured with real search


def test_the_two_stages_of_one_run_are_those_of_two_runs() -> None:
    for together, alone in (
        ("r1_searcher_llama", ("r1_searcher_llama_stage1", "r1_searcher_llama_stage2")),
        ("r1_searcher_paper", ("r1_searcher_paper_stage1", "r1_searcher_paper_stage2")),
    ):
        stages = stages_of(settings_of(f"recipe=published/{together}"))
        assert len(stages) == 2
        for stage, name in zip(stages, alone, strict=True):
            [other] = stages_of(settings_of(f"recipe=published/{name}"))
            assert (stage.algorithm, stage.env) == (other.algorithm, other.env)
            own, others = ({k: v for k, v in vars(one.config).items() if k != "seed"} for one in (stage, other))
            assert own == others


@pytest.mark.parametrize("model", MODELS)
def test_a_model_is_one_word_and_wins_over_the_recipes(model: str) -> None:
    settings = settings_of("recipe=published/search_r1_grpo", f"llm={model}")
    assert settings.start.lower().split("/")[1] == model
    assert settings.env.tokenizer is None  # the model's own
    assert (settings.dtype, settings.algo.precision, settings.parallel) == ("float32", "bfloat16", "fsdp2")
    assert settings.algo.gradient_checkpointing
    assert settings.num_envs == {"qwen2.5-3b": 64, "llama-3.2-3b": 32, "qwen2.5-7b": 16, "llama-3.1-8b": 4}[model.removesuffix("-instruct")]
    assert settings.algo.max_tokens == (4608 if "7b" in model else 8192)


def test_the_models_that_papers_report_on_are_there() -> None:
    sizes = {"qwen2.5-3b", "qwen2.5-7b", "llama-3.2-3b", "llama-3.1-8b"}
    assert sizes | {f"{name}-instruct" for name in sizes} <= set(MODELS)


def test_words_on_the_line_win() -> None:
    settings = settings_of(
        "recipe=published/zerosearch_grpo",
        "start=/models/mine",
        "algo.group_size=1",
        "algo.mask_environment=false",
        "env.top_k=1",
        "env.retriever.noise.start=0.25",
        "evaluation.env.top_k=2",
    )
    assert settings.start == "/models/mine"
    assert (settings.algo.group_size, settings.algo.mask_environment) == (1, False)
    assert settings.env.top_k == 1
    assert settings.env.retriever["noise"] == {"start": 0.25, "end": 0.5, "base": 4}
    assert settings.evaluation.env["top_k"] == 2
    assert settings.evaluation.env["retriever"]["format"] == "zerosearch"


def test_another_retriever_and_reward_replace_those_of_a_recipe() -> None:
    settings = settings_of("recipe=published/search_r1_ppo_v0_3", "env.retriever=bm25", "env.reward=f1", "env=hotpotqa")
    assert (settings.env.retriever, settings.env.reward, settings.env.id) == ("bm25", "f1", "SearchQA-HotpotQA-v0")


def test_a_whole_mapping_on_the_line_replaces_that_of_a_recipe_and_is_not_merged_with_it() -> None:
    settings = settings_of(
        "recipe=published/zerosearch_grpo",
        "env.retriever={name: http, url: 'http://127.0.0.1:7000'}",
        "evaluation.env.retriever={name: online, provider: serpapi}",
    )
    assert settings.env.retriever == {"name": "http", "url": "http://127.0.0.1:7000"}
    assert settings.evaluation.env == {"retriever": {"name": "online", "provider": "serpapi"}}
    swept = "env.retriever={name: bm25},{name: none}"
    assert with_parts([swept, "env.reward={name: em", "algo.steps=2"]) == [swept, "env.reward={name: em", "algo.steps=2"]


def test_a_recipe_of_one_algorithm_refuses_another() -> None:
    with pytest.raises(ConfigCompositionException, match="lam"):
        settings_of("recipe=published/search_r1_ppo", "algo=grpo")


def test_the_adapters_for_one_gpu_change_only_what_they_say() -> None:
    lora, full = (settings_of(f"recipe=published/{name}", "llm=qwen2.5-3b") for name in ("search_r1_grpo_lora", "search_r1_grpo"))
    different = {name for name, value in vars(full.algo).items() if getattr(lora.algo, name) != value}
    assert different == {"questions_per_step", "learning_rate", "checkpoint_every"}
    assert lora.env == full.env
    assert (lora.parallel, lora.dtype, set(lora.lora)) == ("auto", "bfloat16", {"rank", "alpha", "target_modules"})


def test_without_a_model_the_small_world_is_as_it_was() -> None:
    settings = settings_of()
    assert (settings.start, settings.parallel, settings.algo.precision) == ("nothing", "auto", "float32")


def test_questions_of_a_recipe_that_are_not_here_are_named_before_they_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setenv("SEARCHQA_CACHE", str(tmp_path))
    assert missing_data(settings_of("recipe=published/search_r1_grpo").env) == "nq_hotpotqa_train"
    assert missing_data(settings_of("recipe=published/zerosearch_grpo").env) == "zerosearch"
    assert missing_data(settings_of("recipe=published/r1_searcher_qwen").env) is None  # files of one's own


def test_the_help_of_train_lists_models_and_published_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    assert f"  llm={'|'.join(options('llm'))}\n" in said
    assert all(f"  published/{name} " in said for name in RECIPES)
    assert "published/base" not in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("recipe=published/search_r1_pp", "recipe=published/search_r1_ppo"),
        ("recipe=zerosearch_paper_qwen7b", "recipe=published/zerosearch_paper_qwen_7b"),
        ("llm=qwen2.5-3", "llm=qwen2.5-3b"),
    ],
)
def test_a_misspelt_recipe_or_model_is_told_what_was_meant(given: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", given, "dry_run=true"]) == 2
    assert f"Did you mean {meant}" in capsys.readouterr().err


# -- the chat prompt of R1-Searcher ----------------------------------------------------------------------------------------------------------


def test_an_instruct_model_gets_r1_searchers_rules_as_system_message_and_an_opened_thought_behind_its_template() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bytes_of = {letter: number for number, letter in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|eot_id|>", "<|pad|>"])}
    core = Tokenizer(models.BPE(vocab=bytes_of, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    source = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|eot_id|>", pad_token="<|pad|>")  # type: ignore[no-untyped-call]
    env = settings_of("recipe=published/r1_searcher_llama_stage1").env
    arguments = {**env_arguments(env), "questions": QUESTIONS, "retriever": "none"}
    without = build_rules("custom", **{**arguments, "tokenizer": source})
    raw = without.prompt_text(without.source[0])
    assert raw.startswith("You are a helpful assistant.\n")
    assert raw.endswith("\n\nUser:Who wrote Hamlet?\nAssistant: <think>")
    source.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|eot_id|>{% endfor %}[assistant]"
    rules = build_rules("custom", **{**arguments, "tokenizer": source})
    system, _, rest = rules.prompt_text(rules.source[0]).partition("<|eot_id|>")
    assert system == "[system]" + raw.partition("\n\nUser:")[0]
    assert system.endswith('"<|begin_of_documents|> ...search results... <|end_of_documents|>".')
    assert rest == "[user]Who wrote Hamlet?<|eot_id|>[assistant]<think>"
    base = build_rules("custom", **{**arguments, "prompt": "published", "tokenizer": source})
    assert base.prompt_text(base.source[0]).startswith("The User asks a question")


# -- what fits the machine that is named -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_fits_eight_devices_of_80_gb(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEARCHQA_DATA", raising=False)
    monkeypatch.setattr("searchqa_agents.plan.reachable", lambda url: True)
    processes = 1 if recipe in LORA else 8
    plan = make_plan(settings_of(f"recipe=published/{recipe}", f"plan.processes={processes}", "plan.device=h100"))
    assert max(memory.peak for memory in plan.memories.values()) <= plan.limit


# -- what the plan says ----------------------------------------------------------------------------------------------------------------------

PLANNED = ("dry_run=true", "threads=1", "plan.device=h100")


@pytest.mark.parametrize("word", ["plan.memory_gb=-1", "plan.flops_per_second=-1", "plan.bytes_per_second=0", "plan.memory_gb=inf"])
def test_a_machine_that_cannot_be_is_refused(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "start=shipped", *PLANNED, word]) == 1
    assert f"{word.partition('=')[0]} must be above 0 and finite" in capsys.readouterr().err


def test_more_layers_than_the_published_shape_has_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "start=random", "random.like=qwen2.5-0.5b", "random.num_hidden_layers=200", *PLANNED]) == 1
    assert "random.num_hidden_layers cuts the 24 layers of qwen2.5-0.5b and adds none; got 200" in capsys.readouterr().err


def test_an_address_that_is_null_is_no_server() -> None:
    assert list(addresses({"url": None, "urls": None, "retrievers": [{"urls": ["http://a", None]}, {"url": "http://b"}]})) == [
        "http://a",
        "http://b",
    ]


def test_the_closing_line_names_a_stages_own_algorithm_and_a_bound_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    stages = "stages=[{name: a, algo: {name: reinforce_plus_plus, baseline: group}, until: {search_rate: 0.9, over: 2}}, {name: b}]"
    assert main(["train", "start=shipped", "algo=grpo", "algo.steps=7", stages, *PLANNED]) == 0
    said = capsys.readouterr().out
    assert "at most 7 steps of reinforce_plus_plus (baseline: group) (a), evaluation, 7 steps of GRPO (b), evaluation" in said


def test_the_price_is_that_of_the_searches_of_each_stage_and_of_the_evaluations() -> None:
    stages = "stages=[{name: a, env: {retriever: {name: bm25, price: 2}}, until: {steps: 3}}, {name: b}]"
    words = [
        "start=shipped",
        "algo.steps=5",
        "algo.questions_per_step=2",
        "algo.group_size=3",
        "env.max_turns=4",
        "evaluation.questions=10",
    ]
    settings = settings_of(*words, stages, "evaluation.env.retriever={name: bm25, price: 1}", "plan.device=h100")
    measured = 3 * 10 * (2 * 2 + 1) * 3
    assert dict(make_plan(settings).sections["Work"])["price of searches"].startswith(f"{3 * 6 * 3 * 2 + measured:,.2f} at most")


def test_published_files_that_are_not_here_are_said_to_come_with_r1_searchers_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "recipe=published/r1_searcher_qwen", "plan.processes=8", *PLANNED]) == 1
    assert "no such file: data/training_set/stage_2.jsonl. R1-Searcher's files of that name come with a checkout" in capsys.readouterr().err


def test_verl_is_told_which_recipes_are_of_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "verl", "recipe=published/r1_searcher_paper"]) == 1
    said = capsys.readouterr().err
    assert "r1_searcher_paper_stage1 and _stage2" in said


# -- constants of other commands -------------------------------------------------------------------------------------------------------------

R1_SEARCHER_V0 = """\
The User asks a question, and the Assistant solves it.
The Assistant first thinks about the reasoning process in the mind and then provides the User with the final answer.
The output format of reasoning process and final answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, \
i.e., "<think> reasoning process here </think>

<answer> final answer here </answer>".
During the thinking process, the Assistant can perform searching for uncertain knowledge if necessary with the format of \
"<|begin_of_query|> search query (only keywords) here <|end_of_query|>". **A query must involve only a single triple**.
Then, the system will provide the Assistant with helpful information with the format of \
"<|begin_of_documents|> ...search results... <|end_of_documents|>".

User:{question}
Assistant: <think>"""
PRESETS_OF: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (
            "simulator_train",
            f"zerosearch_simulator_{size}b",
            {
                "start": f"Qwen/Qwen2.5-{size}B-Instruct",
                "prompt": "sft",
                "documents": 5,
                "titles": False,
                "notes": False,
                "sft.learning_rate": 1e-6,
            },
        )
        for size in (3, 7, 14)
    ),
    *(
        (
            "select",
            f"r1_searcher_stage{stage}_questions",
            {
                "metric": "em",
                "attempts": 20,
                "medium_from": 10,
                "hard_from": 21,
                **{f"keep.{name}.{level}": count for (name, level), count in counts.items()},
            },
        )
        for stage, counts in (
            (1, {("hotpotqa", "medium"): 200, ("hotpotqa", "hard"): 0, ("2wikimultihopqa", "medium"): 150, ("2wikimultihopqa", "hard"): 0}),
            (
                2,
                {
                    ("hotpotqa", "medium"): 2561,
                    ("hotpotqa", "hard"): 2000,
                    ("2wikimultihopqa", "medium"): 1087,
                    ("2wikimultihopqa", "hard"): 2500,
                },
            ),
        )
    ),
    ("train", "r1_searcher_sft", {"env.dialect": "r1-searcher", "algo.epochs": 3}),
    ("eval", "search_r1_rejection_sampling", {"env.split": "train", "samples": 5}),
    (
        "train",
        "search_r1_sft",
        {
            "env.dialect": "search-r1",
            "env.prompt": "no_search",
            "env.retriever": "none",
            "env.max_turns": 1,
            "algo.demonstrations": "answer",
        },
    ),
    (
        "eval",
        "search_r1_evaluation",
        {
            "env.dialect": "search-r1",
            "env.prompt": "published",
            "env.top_k": 3,
            "env.max_turns": 5,
            "env.max_segment_tokens": 500,
            "env.max_observation_tokens": 500,
            "env.max_context_tokens": 4596,
            "agent.temperature": 0,
            "dtype": "bfloat16",
        },
    ),
    (
        "eval",
        "r1_evaluation",
        {
            "env.dialect": "search-r1",
            "env.prompt": "no_search",
            "env.retriever": "none",
            "env.max_turns": 1,
            "env.max_segment_tokens": 500,
            "agent.temperature": 0,
            "dtype": "bfloat16",
        },
    ),
    (
        "eval",
        "r1_searcher_evaluation",
        {
            "env.dialect": "r1-searcher",
            "env.prompt": R1_SEARCHER_V0,
            "env.top_k": 5,
            "env.max_turns": 9,
            "env.max_segment_tokens": 512,
            "env.max_observation_tokens": 2048,
            "env.max_context_tokens": 22016,
            "agent.temperature": 0,
            "dtype": "bfloat16",
        },
    ),
    (
        "eval",
        "zerosearch_evaluation",
        {
            "env.dialect": "zerosearch",
            "env.prompt": "published",
            "env.top_k": 5,
            "env.max_turns": 3,
            "env.max_segment_tokens": 500,
            "env.max_observation_tokens": 2048,
            "env.max_context_tokens": 4596,
            "agent.temperature": 0,
            "dtype": "bfloat16",
        },
    ),
]
WORDS = {"train": ["algo=sft", "algo.trajectories=x"], "simulator_train": ["rows=x"], "select": [], "eval": ["agent=lm"]}


@pytest.mark.parametrize(("command", "preset", "values"), PRESETS_OF, ids=[preset for _, preset, _ in PRESETS_OF])
def test_the_constants_of_a_preset(command: str, preset: str, values: dict[str, Any]) -> None:
    register()
    register_training()
    for name, node in (
        ("select_types", SelectSettings),
        ("simulator_train_types", SimulatorTrainSettings),
    ):
        ConfigStore.instance().store(name=name, node=node)
    with initialize_config_module("searchqa_conf", version_base="1.3"):
        config = compose(command, overrides=[f"+published={preset}", *WORDS[command]])
    path = FOLDER.parents[1] / "published" / f"{preset}.yaml"
    assert {key: OmegaConf.select(config, key) for key in flat(yaml.safe_load(path.read_text(encoding="utf-8")))} == values
    lines = [line for line in path.read_text(encoding="utf-8").splitlines()[2:] if not line.startswith("#")]
    assert all("#" in line for line in lines if not line.endswith(":"))


def test_every_preset_is_asserted_and_the_stages_of_r1_searcher_have_their_published_sizes() -> None:
    assert sorted(preset for _, preset, _ in PRESETS_OF) == options("published")
    for stage, size in ((1, 350), (2, 8148)):
        values = next(values for _, preset, values in PRESETS_OF if preset == f"r1_searcher_stage{stage}_questions")
        assert sum(count for key, count in values.items() if key.startswith("keep.")) == size


@pytest.mark.parametrize(
    "line",
    [
        ["simulator", "train", "+published=zerosearch_simulator_14b", "rows=rows.jsonl"],
        ["data", "select", "+published=r1_searcher_stage2_questions"],
        ["eval", "+published=search_r1_rejection_sampling", "env=nq_hotpotqa", "agent=lm"],
        ["train", "+published=r1_searcher_sft", "llm=qwen2.5-7b", "algo=sft", "algo.trajectories=runs/collected"],
    ],
    ids=lambda line: line[-1] if line[0] == "train" else line[0],
)
def test_a_preset_is_one_word_on_its_commands_line(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*line, "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    [wanted] = [values for _, preset, values in PRESETS_OF if f"+published={preset}" in line]
    assert {key: value_of(shown, key) for key in wanted} == wanted
