"""A small multi-latent attention, whose heads of queries, of keys and of values differ in width."""

LATENT = {
    "multi_latent_attention": True,
    "kv_channels": 8,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    "qk_layernorm": True,
}
