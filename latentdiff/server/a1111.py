"""A1111's API under /sdapi/v1, as its clients speak it: text and picture to picture, progress, interruption.

https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/API. A mask's white is redrawn. Pictures come back in
base64 without a prefix, and `info` is JSON in a string. What this server cannot do is refused; what clients
send with every request and it does without is named in the header `x-ignored`.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from latentdiff.core.errors import ConfigError
from latentdiff.diffusion.samplers import SAMPLERS
from latentdiff.drawing.cascade import final_of
from latentdiff.drawing.files import encoded
from latentdiff.drawing.record import parameters_text
from latentdiff.server.answers import ignored
from latentdiff.server.controls import controls_of
from latentdiff.server.studio import (
    MOST_PICTURES,
    Order,
    Studio,
    client_of,
    from_base64,
    picture_mask,
    read_picture,
    to_base64,
)
from latentdiff.server.work import FinishedPicture, StoppedError, Ticket, finished_pictures

Count = Annotated[int, Field(ge=1, le=MOST_PICTURES)]
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what is not supported -> values that mean nothing, beside empty ones
    **dict.fromkeys(("restore_faces", "tiling", "styles", "script_name", "refiner_checkpoint"), ()),
    **dict.fromkeys(("s_churn", "s_tmin", "firstphase_width", "firstphase_height"), ()),
    **dict.fromkeys(("seed_resize_from_w", "seed_resize_from_h"), (-1,)),
    **dict.fromkeys(("s_noise", "initial_noise_multiplier"), (1,)),
    "inpainting_fill": (0, 1),  # from the picture's own pixels
    "resize_mode": (),
}
NEUTRAL_HIRES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("hr_resize_x", "hr_resize_y", "hr_second_pass_steps", "hr_checkpoint_name"), ()),
    "hr_sampler_name": ("Use same sampler",),
    "hr_scheduler": ("Use same scheduler",),
}
READ_OVERRIDES = {"sd_model_checkpoint", "CLIP_stop_at_last_layers"}
IGNORED = {"image_cfg_scale", "hr_upscaler", "inpainting_fill"}
_AUTOMATIC = ("automatic", "use same scheduler", "")


class Settings(BaseModel):
    """The body of txt2img and img2img, as far as it is read."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: str = ""
    negative_prompt: str = ""
    seed: int = -1
    subseed: int = -1
    subseed_strength: float = 0.0
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Count = 1
    n_iter: Count = 1
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    eta: float | None = None
    enable_hr: bool = False
    hr_scale: float = 2.0
    denoising_strength: float | None = None
    init_images: list[str] = []
    mask: str | None = None
    mask_blur: float = 4.0
    inpainting_mask_invert: int = 0
    inpaint_full_res: bool = False
    inpaint_full_res_padding: Annotated[int, Field(ge=0)] = 0
    send_images: bool = True
    alwayson_scripts: Any = None
    override_settings: dict[str, Any] = {}

    def drawing(self) -> dict[str, Any]:
        """The settings of drawing. Raises ConfigError for what is not supported."""
        self._refuse()
        options: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "seed": _seed(self.seed),
            "num_images": self.batch_size * self.n_iter,
            "batch_size": self.batch_size,
            "num_inference_steps": self.steps,
            "guidance_scale": self.cfg_scale,
            "width": self.width,
            "height": self.height,
        }
        sampler = self.sampler_name or self.sampler_index
        if sampler is not None:
            options["sampler"] = sampler
        if self.scheduler is not None and self.scheduler.lower() not in _AUTOMATIC:
            options["spacing"] = self.scheduler
        if self.eta not in (None, 1.0):  # clients send 1, the default of ancestral samplers, with every sampler
            options["eta"] = self.eta
        if self.subseed_strength:
            options |= {"variation_seed": _seed(self.subseed), "variation_strength": self.subseed_strength}
        if self.enable_hr:
            options |= {"hires_scale": self.hr_scale, "hires_strength": self.denoising_strength}
        skipped = self.override_settings.get("CLIP_stop_at_last_layers", 1)
        if not isinstance(skipped, int):
            raise ConfigError("override_settings.CLIP_stop_at_last_layers must be a whole number")
        if skipped > 1:
            options["clip_skip"] = skipped - 1
        return {name: value for name, value in options.items() if value is not None}

    def _refuse(self) -> None:
        neutral = dict(NEUTRAL)
        if self.enable_hr:
            neutral |= {**NEUTRAL_HIRES, "hr_prompt": (self.prompt,), "hr_negative_prompt": (self.negative_prompt,)}
        for name, value in (self.model_extra or {}).items():
            if name in neutral and value and value not in neutral[name]:
                raise ConfigError(f"{name} is not supported")
        for name in self.override_settings.keys() - READ_OVERRIDES:
            raise ConfigError(f"override_settings.{name[:60]} is not supported")

    def unread(self) -> list[str]:
        """The settings that are ignored: some that clients send with every request, and unknown ones."""
        known = {*NEUTRAL, *NEUTRAL_HIRES, "hr_prompt", "hr_negative_prompt"} - IGNORED
        return sorted(name for name, value in (self.model_extra or {}).items() if name not in known and value)


def _seed(seed: int) -> int:
    """A1111's -1 is a random seed."""
    return secrets.randbelow(2**32) if seed == -1 else seed


def title(studio: Studio, name: str) -> str:
    """A model's name with the beginning of its hash, if it is loaded."""
    sha256 = studio.shelf.hash_of(name)
    return name if sha256 is None else f"{name} [{sha256[:10]}]"


def checkpoint_named(studio: Studio, checkpoint: Any) -> str:
    """The model of a title, a name or the beginning of a hash. Raises ConfigError."""
    for name in studio.shelf.names():
        if checkpoint in (name, title(studio, name), (studio.shelf.hash_of(name) or "")[:10] or None):
            return name
    raise studio.shelf.unknown(checkpoint)


def routes(studio: Studio) -> APIRouter:
    """The routes under /sdapi/v1."""
    router = APIRouter(prefix="/sdapi/v1")

    @router.post("/txt2img")
    async def txt2img(settings: Settings, http: HttpRequest) -> Response:
        return await _answered(studio, settings, http, {})

    @router.post("/img2img")
    async def img2img(settings: Settings, http: HttpRequest) -> Response:
        if len(settings.init_images) != 1:
            raise ConfigError(f"init_images must be one picture (got {len(settings.init_images)})")
        image = await run_in_threadpool(lambda: read_picture(from_base64(settings.init_images[0]), "init_images"))
        further: dict[str, Any] = {
            "strength": 0.75 if settings.denoising_strength is None else settings.denoising_strength
        }
        mask = None
        if settings.mask is not None:
            coded, inverted = settings.mask, bool(settings.inpainting_mask_invert)
            mask = await run_in_threadpool(lambda: picture_mask(from_base64(coded), image, inverted=inverted))
            further["mask_blur"] = settings.mask_blur
            if settings.inpaint_full_res:
                further["padding_mask_crop"] = settings.inpaint_full_res_padding
        return await _answered(studio, settings, http, further, image=image, mask=mask)

    @router.get("/progress")
    def progress(http: HttpRequest, skip_current_image: bool = False) -> dict[str, Any]:
        client = client_of(http)
        tickets = studio.worker.current(client)
        steps, done = sum(t.steps for t in tickets), sum(t.done for t in tickets)
        share = done / steps if steps else 0.0
        left = max((t.seconds_left or 0.0 for t in tickets), default=0.0)
        preview = None if skip_current_image or not tickets else studio.worker.preview(client)
        state = {
            "skipped": False,
            "interrupted": any(t.cancelled for t in tickets),
            "job": "drawing" if tickets else "",
            "job_count": len(tickets) + studio.worker.waiting,
            "job_no": 0,
            "job_timestamp": "0",
            "sampling_step": done,
            "sampling_steps": steps,
        }
        image = None if preview is None else to_base64(encoded(preview, ".png", None))
        return {"progress": share, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}

    @router.post("/interrupt")
    @router.post("/skip")
    def interrupt(http: HttpRequest) -> dict[str, Any]:
        studio.worker.interrupt(client_of(http))
        return {}

    return router


async def _answered(
    studio: Studio, settings: Settings, http: HttpRequest, further: dict[str, Any], **changes: Any
) -> Response:
    model = settings.override_settings.get("sd_model_checkpoint")
    chosen = None if model is None else checkpoint_named(studio, model)
    controls = await run_in_threadpool(controls_of, settings.alwayson_scripts)
    drawing = {**settings.drawing(), **further, **controls.settings}
    order = Order(drawing, client_of(http), chosen, controls=controls.names, hints=controls.hints, interruptible=True)
    ticket = await studio.submit(replace(order, **changes))
    pictures: dict[int, FinishedPicture] = {}
    try:
        async for event in finished_pictures(ticket, http.is_disconnected):
            pictures[event.number] = event
    except StoppedError:
        if not ticket.cancelled or studio.worker.stopping:
            raise  # otherwise interrupted: what is drawn is the answer
    in_order = [pictures[number] for number in sorted(pictures)]
    images = [to_base64(each.kept.png) for each in in_order] if settings.send_images else []
    read = {*Settings.model_fields} - {"init_images", "mask", "override_settings", "alwayson_scripts"}
    body = settings.model_dump(include=read)
    answer = {"images": images, "parameters": body, "info": _info(ticket, in_order)}
    return JSONResponse(answer, headers=ignored([*settings.unread(), *controls.unread]))


def _info(ticket: Ticket, pictures: list[FinishedPicture]) -> str:
    """A1111's `info`, JSON in a string."""
    card = ticket.painter.model.card
    request = ticket.jobs[0].request
    height, width = final_of(ticket.jobs[0], ticket.painter)
    varied = request.variation_seed is not None
    seeds = [job.request.seed if varied else job.seed for job in ticket.jobs]
    subseeds = [(job.request.variation_seed or 0) + job.index if varied else job.seed for job in ticket.jobs]
    count = len(ticket.jobs)
    return json.dumps(
        {
            "prompt": request.prompt,
            "all_prompts": [request.prompt] * count,
            "negative_prompt": request.negative_prompt,
            "all_negative_prompts": [request.negative_prompt] * count,
            "seed": seeds[0],
            "all_seeds": seeds,
            "subseed": subseeds[0],
            "all_subseeds": subseeds,
            "subseed_strength": request.variation_strength,
            "width": width,
            "height": height,
            "sampler_name": SAMPLERS[request.sampler].label,
            "cfg_scale": request.guidance_scale,
            "steps": request.num_inference_steps,
            "batch_size": request.batch_size,
            "sd_model_name": card.name,
            "sd_model_hash": card.hash[:10],
            "denoising_strength": request.strength or request.hires_strength,
            "clip_skip": (request.clip_skip or 0) + 1,
            "index_of_first_image": 0,
            "styles": [],
            "infotexts": [parameters_text(each.record) for each in pictures],
        }
    )
