#!/usr/bin/env bash
# Trains with verl (0.9) on one machine, or on the Ray cluster that RAY_ADDRESS names; several_machines.sh makes such a cluster.
#
#   scripts/verl/train.sh ppo|grpo|reinforce_plus_plus [verl override ...]
#
# PYTHON names the Python of an environment with verl and this project (engines_environment.sh says how to make one); default python3.
# First write the rows:
#   searchqa data rows hotpotqa --split train --out data/train.parquet
#   searchqa data rows hotpotqa --split dev --count 512 --out data/dev.parquet
#
# Every setting below is a variable (MODEL=Qwen/Qwen2.5-7B GPUS=8 scripts/verl/train.sh grpo), and overrides on the line win. Learning rates, warm-up,
# batches, KL, clipping and lengths are Search-R1's published ones (arXiv 2503.09516, and its scripts v0.2). Three differences: verl masks environment
# tokens in GAE, in whitening and in the critic's loss too; a GRPO mini-batch is whole groups, so 8 updates a step instead of 10; top-p is 1 throughout.
# Search-R1 publishes no REINFORCE++: that is its PPO without a critic, with verl's estimator of that name.
#
# Never run on a GPU by us: only composed and checked by verl's own validation (tests/agents/integrations/test_verl_scripts.py).
set -euo pipefail

algorithm=${1:?"usage: $0 ppo|grpo|reinforce_plus_plus [verl override ...]"}
shift
python=${PYTHON:-python3}

MODEL=${MODEL:-Qwen/Qwen2.5-3B}
TRAIN=${TRAIN:-data/train.parquet}
DEV=${DEV:-data/dev.parquet}
NODES=${NODES:-1}
GPUS=${GPUS:-8} # on each node
ROLLOUT=${ROLLOUT:-vllm} # or sglang
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
GPU_MEMORY=${GPU_MEMORY:-0.6}
TOKENS_PER_GPU=${TOKENS_PER_GPU:-16384}
OFFLOAD=${OFFLOAD:-False} # True: weights and optimiser leave the GPU while it generates (7B on 8 x 80 GB)
AGENT_WORKERS=${AGENT_WORKERS:-8}
AGENT_LOOPS=${AGENT_LOOPS:-$("$python" -c 'import os, searchqa_agents; print(os.path.join(os.path.dirname(searchqa_agents.__file__), "integrations", "verl_agent_loops.yaml"))')}
RUN=${RUN:-$algorithm-$(basename "$MODEL")}

PROMPTS=${PROMPTS:-512} # per step
STEPS=${STEPS:-500}
PROMPT_LENGTH=${PROMPT_LENGTH:-2048}
RESPONSE_LENGTH=${RESPONSE_LENGTH:-4096} # segments and replies; at least max_context_tokens in AGENT_LOOPS, so that nothing is cut
ACTOR_LR=${ACTOR_LR:-1e-6}
ACTOR_WARMUP=${ACTOR_WARMUP:-0.285}
CRITIC_LR=${CRITIC_LR:-1e-5}
CRITIC_WARMUP=${CRITIC_WARMUP:-0.015}
KL=${KL:-0.001}
ENTROPY=${ENTROPY:-0.001}

case $algorithm in
    ppo) # KL (k1) in the reward, 2 updates a step
        GROUP=${GROUP:-1}
        MINI_BATCH=${MINI_BATCH:-256} # prompts
        own=(
            algorithm.adv_estimator=gae
            algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl algorithm.kl_ctrl.type=fixed "algorithm.kl_ctrl.kl_coef=$KL"
            actor_rollout_ref.actor.use_kl_loss=False
            "critic.model.path=$MODEL" "critic.optim.lr=$CRITIC_LR" "critic.optim.lr_warmup_steps_ratio=$CRITIC_WARMUP"
            "critic.ppo_mini_batch_size=$MINI_BATCH" critic.cliprange_value=0.5
            critic.model.enable_gradient_checkpointing=True critic.model.use_remove_padding=True
            "critic.ppo_max_token_len_per_gpu=$((2 * TOKENS_PER_GPU))"
            "critic.fsdp.param_offload=$OFFLOAD" "critic.fsdp.optimizer_offload=$OFFLOAD"
        )
        ;;
    grpo) # KL (k3) in the loss
        GROUP=${GROUP:-5}
        MINI_BATCH=${MINI_BATCH:-64} # prompts; times GROUP sequences
        own=(
            algorithm.adv_estimator=grpo algorithm.norm_adv_by_std_in_grpo=True
            algorithm.use_kl_in_reward=False
            actor_rollout_ref.actor.use_kl_loss=True "actor_rollout_ref.actor.kl_loss_coef=$KL" actor_rollout_ref.actor.kl_loss_type=low_var_kl
        )
        ;;
    reinforce_plus_plus) # KL (k1) in the reward
        GROUP=${GROUP:-1}
        MINI_BATCH=${MINI_BATCH:-256} # prompts
        own=(
            algorithm.adv_estimator=reinforce_plus_plus
            algorithm.use_kl_in_reward=True algorithm.kl_penalty=kl algorithm.kl_ctrl.type=fixed "algorithm.kl_ctrl.kl_coef=$KL"
            actor_rollout_ref.actor.use_kl_loss=False
        )
        ;;
    *)
        echo "$0: the algorithm must be ppo, grpo or reinforce_plus_plus; got $algorithm" >&2
        exit 2
        ;;
esac

exec "$python" -m verl.trainer.main_ppo \
    algorithm.gamma=1.0 algorithm.lam=1.0 \
    "data.train_files=$TRAIN" "data.val_files=$DEV" \
    "data.train_batch_size=$PROMPTS" "data.max_prompt_length=$PROMPT_LENGTH" "data.max_response_length=$RESPONSE_LENGTH" \
    "actor_rollout_ref.model.path=$MODEL" \
    actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.model.enable_gradient_checkpointing=True \
    "actor_rollout_ref.actor.optim.lr=$ACTOR_LR" "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio=$ACTOR_WARMUP" \
    actor_rollout_ref.actor.optim.weight_decay=0.01 actor_rollout_ref.actor.grad_clip=1.0 \
    "actor_rollout_ref.actor.ppo_mini_batch_size=$MINI_BATCH" actor_rollout_ref.actor.ppo_epochs=1 \
    actor_rollout_ref.actor.use_dynamic_bsz=True "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=$TOKENS_PER_GPU" \
    actor_rollout_ref.actor.clip_ratio=0.2 actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.2 \
    "actor_rollout_ref.actor.entropy_coeff=$ENTROPY" actor_rollout_ref.actor.loss_agg_mode=token-mean \
    "actor_rollout_ref.actor.fsdp_config.param_offload=$OFFLOAD" "actor_rollout_ref.actor.fsdp_config.optimizer_offload=$OFFLOAD" \
    "actor_rollout_ref.ref.fsdp_config.param_offload=$OFFLOAD" \
    "actor_rollout_ref.rollout.name=$ROLLOUT" actor_rollout_ref.rollout.skip_tokenizer_init=False \
    "actor_rollout_ref.rollout.tensor_model_parallel_size=$TENSOR_PARALLEL" "actor_rollout_ref.rollout.gpu_memory_utilization=$GPU_MEMORY" \
    "actor_rollout_ref.rollout.max_model_len=$((PROMPT_LENGTH + RESPONSE_LENGTH))" \
    "actor_rollout_ref.rollout.n=$GROUP" actor_rollout_ref.rollout.temperature=1.0 actor_rollout_ref.rollout.top_p=1.0 \
    actor_rollout_ref.rollout.calculate_log_probs=True \
    "actor_rollout_ref.rollout.agent.num_workers=$AGENT_WORKERS" actor_rollout_ref.rollout.agent.default_agent_loop=searchqa \
    "actor_rollout_ref.rollout.agent.agent_loop_config_path=$AGENT_LOOPS" \
    trainer.use_v1=True trainer.v1.trainer_mode=sync trainer.v1.sampler.sync_refill_failed_groups=False \
    "trainer.nnodes=$NODES" "trainer.n_gpus_per_node=$GPUS" \
    "trainer.total_training_steps=$STEPS" trainer.total_epochs=15 trainer.save_freq=100 trainer.test_freq=50 \
    trainer.project_name=searchqa "trainer.experiment_name=$RUN" 'trainer.logger=[console,tensorboard]' \
    "${own[@]}" "$@"
