"""What the rest of the project knows of a model family beside its code in `modeling/`, by `config.model_type`."""

from typing import Any, NamedTuple


class Paper(NamedTuple):
    """A paper to cite: its title, its number at arxiv.org, and its authors as BibTeX has them."""

    title: str
    number: str
    authors: str


class ModelFamily(NamedTuple):
    """One family.

    `architecture` is what cards call it, `paper` what they cite. `projections` is a pattern of the names of all
    projections of its blocks, by the family's own names: a full pattern, because the end of a name can mean more
    than it seems to (`ff_out` is a projection of LLaDA's blocks, and also its head). `published_projections` is what
    remains of dParallel's published list (q_proj k_proj v_proj o_proj gate_proj up_proj down_proj), since its code
    passes over names that a model does not have; None where dParallel published nothing for the family.
    `distillation` holds the settings that dParallel published for it, if any, see `CertaintyForcingConfig`.
    """

    architecture: str
    paper: Paper
    projections: str
    published_projections: str | None = None
    distillation: dict[str, Any] = {}


QWEN_PROJECTIONS = r".*\.layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
FAMILIES = {
    "llada": ModelFamily(
        architecture="LLaDA's architecture",
        paper=Paper(
            "Large Language Diffusion Models", "2502.09992",
            "Nie, Shen and Zhu, Fengqi and You, Zebin and Zhang, Xiaolu and Ou, Jingyang and Hu, Jun and Zhou, Jun "
            "and Lin, Yankai and Wen, Ji-Rong and Li, Chongxuan",
        ),
        projections=r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
        published_projections=r".*\.blocks\.\d+\.(q_proj|k_proj|v_proj|up_proj)",
        distillation={"masking": "block", "certainty_weight": 2.0, "max_length": 384, "response_length": None},
    ),
    "Dream": ModelFamily(
        architecture="Dream's architecture",
        paper=Paper(
            "Dream 7B: Diffusion Large Language Models", "2508.15487",
            "Ye, Jiacheng and Xie, Zhihui and Zheng, Lin and Gao, Jiahui and Wu, Zirui and Jiang, Xin and Li, Zhenguo "
            "and Kong, Lingpeng",
        ),
        projections=QWEN_PROJECTIONS,
        published_projections=QWEN_PROJECTIONS,
        distillation={"masking": "response", "certainty_weight": 1.0, "max_length": None, "response_length": 256},
    ),
    "sdar": ModelFamily(
        architecture="SDAR's architecture",
        paper=Paper(
            "SDAR: A Synergistic Diffusion-AutoRegression Paradigm for Scalable Sequence Generation", "2510.06303",
            "Cheng, Shuang and Bian, Yihan and Liu, Dawei and Zhang, Linfeng and Yao, Qian and Tian, Zhongbo and "
            "Wang, Wenhai and Guo, Qipeng and Chen, Kai and Qi, Biqing and Zhou, Bowen",
        ),
        projections=QWEN_PROJECTIONS,
    ),
}  # fmt: skip


def family_of(model_type: str | None) -> ModelFamily | None:
    """The family of models whose configuration says this `model_type`, or None for one that is not of this package."""
    return FAMILIES.get(model_type or "")
