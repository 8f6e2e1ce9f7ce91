"""AdamW for a model whose parameters rest in the dtype that it computes in."""
import torch


def widened(x, buffer):
    """`x`, or what it holds in a float32 buffer if it rests in 16 bits."""
    return x if buffer is None or x.dtype == buffer.dtype else buffer[:len(x)].copy_(x)


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) that keeps a float32 master of every trainable parameter of 16 bits.

    A step takes each gradient in whatever dtype it came, scales it, calls torch's fused kernel on masters and moments,
    and leaves the rounded new weights in the parameters. It works in slices, so that what is float32 only while it is
    used needs little memory. A parameter in float32 or float64 is its own master. Matrices decay, biases and norms do
    not. Nothing here waits for an NVIDIA GPU.
    """

    def __init__(self, model, dtype, betas=(0.9, 0.99), weight_decay=0.1, low_memory=False):
        """Moves `model` to `dtype`. low_memory: both moments rest in bfloat16."""
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for p in self.parameters.values():
            p.data = p.data.to(torch.promote_types(dtype, torch.float32))
        self.masters = {name: p.detach() for name, p in self.parameters.items()}
        model.to(dtype)  # gives a parameter new memory, and leaves its master alone, unless they are of one dtype
        moment_dtype = torch.bfloat16 if low_memory else None
        self.means = {name: torch.zeros_like(p, dtype=moment_dtype) for name, p in self.masters.items()}
        self.squares = {name: torch.zeros_like(p, dtype=moment_dtype) for name, p in self.masters.items()}
        self.dtype, self.betas, self.weight_decay = dtype, betas, weight_decay
        # float16 cannot hold small gradients: the loss is scaled up, twice as far after 2,000 good steps in a row
        first = next(iter(self.masters.values()))
        self.loss_scale = torch.full_like(first.flatten()[0], 2.0**16 if dtype == torch.float16 else 1.0)
        self.steps = torch.zeros((), device=first.device)
        self.good_steps = torch.zeros((), device=first.device)
        # elements of a slice: on a CPU few enough to stay in its cache; a buffer for each of gradient, mean and square
        # that rests in 16 bits
        self.slice_size = 1 << 18 if first.device.type == "cpu" else 1 << 24
        self.buffers = [first.new_empty(self.slice_size) if needed else None
                        for needed in (dtype != first.dtype, low_memory, low_memory)]

    def zero_grad(self, in_float32=False):
        """Forgets the gradients. Those that come next have the parameter's dtype or, to be summed over micro-batches or
        processes, are float32."""
        for name, p in self.parameters.items():
            p.grad = None
            p.grad_dtype = self.masters[name].dtype if in_float32 else p.dtype

    @torch.no_grad()
    def step(self, learning_rate, loss, grad_clip):
        """One step with the gradients of the scaled loss, their norm limited to grad_clip (0: no limit), after which
        they are forgotten. Nothing changes where the loss or the norm is not finite. Returns the norm, a scalar on the
        device."""
        # in slices: torch's norm of a whole embedding is 0.3 % off on a CPU; and by dot, which is quicker than a norm
        parts = (widened(part, self.buffers[0]) for p in self.parameters.values() if p.grad is not None
                 for part in p.grad.view(-1).split(self.slice_size))
        norm = torch.stack([torch.dot(part, part) for part in parts]).sum().sqrt() / self.loss_scale
        skipped = ~(norm + loss).isfinite()
        scale = (grad_clip / (norm + 1e-6)).clamp(max=1) if grad_clip else torch.ones_like(norm)
        scale, found_inf = scale / self.loss_scale, skipped.float()
        self.steps += 1 - found_inf
        ignores_found_inf = norm.device.type == "mps"  # its kernel does, so it must wait (pytorch/pytorch#186360)
        for name, p in self.parameters.items():
            if p.grad is not None and not (ignores_found_inf and skipped):
                self.step_in_slices(name, p, scale, found_inf, learning_rate)
            p.grad = None
        if self.dtype == torch.float16:
            self.good_steps = torch.where(skipped, 0, self.good_steps + 1)
            grown = torch.where(self.good_steps % 2000 == 0, self.loss_scale * 2, self.loss_scale)
            self.loss_scale = torch.where(skipped, self.loss_scale / 2, grown)
        return norm

    def step_in_slices(self, name, parameter, scale, found_inf, learning_rate):
        tensors = self.masters[name], parameter.grad, self.means[name], self.squares[name], parameter.data
        slices = [tensor.view(-1).split(self.slice_size) for tensor in tensors]
        for master, grad, mean, square, weight in zip(*slices, strict=True):
            wide = list(map(widened, (grad, mean, square), self.buffers))
            torch._fused_adamw_(
                [master], [wide[0].mul_(scale)], [wide[1]], [wide[2]], [], [self.steps], lr=learning_rate,
                beta1=self.betas[0], beta2=self.betas[1], eps=1e-8, amsgrad=False, maximize=False,
                weight_decay=self.weight_decay if parameter.dim() >= 2 else 0.0, found_inf=found_inf)
            if mean.dtype != master.dtype:
                mean.copy_(wide[1])
                square.copy_(wide[2])
            if weight.dtype != master.dtype:
                weight.copy_(master)

    def state_dict(self):
        """All that a step depends on, by parameter name."""
        return {"masters": self.masters, "means": self.means, "squares": self.squares, "steps": self.steps,
                "loss_scale": self.loss_scale, "good_steps": self.good_steps}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes what `state_dict` gave, dtypes unchanged; the parameters follow the masters."""
        for kind in ("masters", "means", "squares"):
            own, given = getattr(self, kind), state[kind]
            assert own.keys() == given.keys(), f"{kind} of other parameters"
            for name, tensor in own.items():
                assert tensor.dtype == given[name].dtype and tensor.shape == given[name].shape, f"{kind} of {name}"
                tensor.copy_(given[name])
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])
        for name in ("steps", "loss_scale", "good_steps"):
            getattr(self, name).copy_(state[name])
