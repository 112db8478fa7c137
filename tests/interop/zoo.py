"""Tiny text pipelines of the real classes: random weights, tokenizers made here, nothing fetched.

``CALLS`` are the arguments that keep a run small; everything else is the pipeline's own default.
"""

from __future__ import annotations

from typing import Any

import torch

TEXT = (
    "<pad> <s> </s> <unk> a photo two red boats boat on quiet lake one dog dogs of the blue cat house in snow blurry "
    "ugly , . <| im_start |> im_end system user assistant describe image :"
)
WORDS = TEXT.split()
LENGTH = 10  # tokens of a prompt
SMALL = {"height": 32, "width": 32}
CALLS: dict[str, dict[str, Any]] = {
    "sd15": {},
    "sd_inpaint": {},
    "sd_img2img": {},
    "sdxl": {},
    "sd3": {**SMALL, "max_sequence_length": LENGTH},
    "flux": {**SMALL, "max_sequence_length": LENGTH},
    "flux2": {**SMALL, "max_sequence_length": LENGTH, "text_encoder_out_layers": [0, 1]},
    "pixart": {**SMALL, "use_resolution_binning": False, "max_sequence_length": LENGTH},
    "sana": {
        **SMALL, "use_resolution_binning": False, "max_sequence_length": LENGTH, "complex_human_instruction": None,
    },
    "qwen": SMALL,
    "z_image": {**SMALL, "max_sequence_length": LENGTH},
    "wan": {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": LENGTH},
}  # fmt: skip
KINDS = tuple(CALLS)


def build(kind: str):
    """One pipeline, its weights shaken so that none is zero."""
    torch.manual_seed(7)
    pipe = globals()[f"_{kind}"]()
    rng = torch.Generator().manual_seed(3)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            with torch.no_grad():
                for value in part.parameters():
                    value.add_(0.05 * torch.randn(value.shape, generator=rng))
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer(length: int = LENGTH):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        model_max_length=length,
    )  # fmt: skip
    made.chat_template = "{% for m in messages %}user {{ m.content }}{% endfor %}"
    return made


def _clip(projected: bool = False, width: int = 8):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(kind: str = "T5EncoderModel", width: int = 8):
    import transformers

    config = {"T5EncoderModel": "T5Config", "UMT5EncoderModel": "UMT5Config"}[kind]
    made = getattr(transformers, config)(
        vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return getattr(transformers, kind)(made)


def _vae(channels: int = 4, **options):
    from diffusers import AutoencoderKL

    blocks = 4
    return AutoencoderKL(
        latent_channels=channels, block_out_channels=(4,) * blocks, norm_num_groups=2, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks, **options,
    )  # fmt: skip


def _unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**{
        "sample_size": 4, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1,
        "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **options,
    })  # fmt: skip


def _ddim(**options):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1, **options,
    })  # fmt: skip


def _flow(**options):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**options)


def _sd15():
    from diffusers import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    vision = {
        "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "projection_dim": 8,
    }  # fmt: skip
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=_clip().config.to_dict(), vision_config=vision, projection_dim=8)
    )
    features = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return StableDiffusionPipeline(_vae(), _clip(), _tokenizer(), _unet(), _ddim(), checker, features)


def _sd_inpaint():
    from diffusers import EulerDiscreteScheduler, StableDiffusionInpaintPipeline

    scheduler = EulerDiscreteScheduler.from_config(_ddim().config)
    return StableDiffusionInpaintPipeline(
        _vae(), _clip(), _tokenizer(), _unet(in_channels=9), scheduler, None, None, requires_safety_checker=False
    )


def _sd_img2img():
    from diffusers import StableDiffusionImg2ImgPipeline

    return StableDiffusionImg2ImgPipeline(
        _vae(), _clip(), _tokenizer(), _unet(), _ddim(), None, None, requires_safety_checker=False
    )


def _sdxl():
    from diffusers import StableDiffusionXLPipeline

    unet = _unet(
        cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8, use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        _vae(), _clip(), _clip(True), _tokenizer(), _tokenizer(), unet, _ddim(prediction_type="v_prediction"),
        add_watermarker=False,
    )  # fmt: skip


def _sd3():
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    net = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=4,
        num_attention_heads=2, caption_projection_dim=8, joint_attention_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        net, _flow(shift=3.0), _vae(shift_factor=0.06, scaling_factor=1.5), _clip(True), _tokenizer(), _clip(True),
        _tokenizer(), _t5(width=16), _tokenizer(),
    )  # fmt: skip


def _flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel

    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    scheduler = _flow(use_dynamic_shifting=True, shift=3.0)
    vae = _vae(shift_factor=0.1159, scaling_factor=0.3611)
    return FluxPipeline(scheduler, vae, _clip(), _tokenizer(), _t5(), _tokenizer(), net)


def _flux2():
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

    net = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False,
    )  # fmt: skip
    blocks = 4
    vae = AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(4,) * blocks, norm_num_groups=2, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
    )  # fmt: skip
    rng = torch.Generator().manual_seed(5)
    vae.bn.running_mean.copy_(torch.randn(16, generator=rng))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=rng))
    return Flux2KleinPipeline(_flow(use_dynamic_shifting=True), vae, _qwen3(), _tokenizer(), net)


def _qwen3(width: int = 8):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=2, head_dim=4,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def _pixart():
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    net = PixArtTransformer2DModel(
        sample_size=4, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=8,
        in_channels=4, out_channels=8, cross_attention_dim=8, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtSigmaPipeline(_tokenizer(), _t5(), _vae(), net, _ddim())


def _sana():
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    net = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=4, timestep_scale=0.5,
    )  # fmt: skip
    kinds = ("ResBlock",) * 4
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=kinds, decoder_block_types=kinds,
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4, encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4,
        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
        decoder_act_fns="silu", scaling_factor=0.41407,
    )  # fmt: skip
    text = Gemma2Model(
        Gemma2Config(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, head_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            attn_implementation="eager",
        )
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
    )
    return SanaPipeline(_tokenizer(), text, vae, net, scheduler)


def _qwen():
    from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    net = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip
    text = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(WORDS), "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
                "num_attention_heads": 1, "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1,
                "eos_token_id": 2,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            },
            vision_config={"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": 8},
        )
    )  # fmt: skip
    scheduler = _flow(use_dynamic_shifting=True, shift_terminal=0.02, max_shift=0.9)
    return QwenImagePipeline(scheduler, vae, text, _tokenizer(), net)


def _z_image():
    from diffusers import ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    net = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[2, 2, 4], axes_lens=[128, 32, 32],
    )  # fmt: skip
    text = Qwen3Model(
        Qwen3Config(
            vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=2, head_dim=4,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
        )
    )  # fmt: skip
    vae = _vae(shift_factor=0.1159, scaling_factor=0.3611)
    return ZImagePipeline(_flow(shift=3.0), vae, text, _tokenizer(), net)


def _wan():
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    net = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=1, rope_max_seq_len=16,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.5, 1.0],
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(_tokenizer(), _t5("UMT5EncoderModel"), vae, scheduler, net)
