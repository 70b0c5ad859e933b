"""Bodies of loops that call the scaler wrongly, as a stranger would write them; `# here` marks the line."""

RECIPES = {
    "scaler with bfloat16": (
        "scaler-with-bfloat16",
        """\
optimizer.zero_grad()
with brain():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "scaled kept": (
        "scaled-twice",
        """\
optimizer.zero_grad()
with half():
    loss = scaler.scale(criterion(model(inputs), labels))
scaler.scale(loss).backward()  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "optimizer itself": (
        "step-around-scaler",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
optimizer.step()  # here
scaler.update()
""",
    ),
    "both steps": (
        "step-around-scaler",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
optimizer.step()  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "second optimizer around": (
        "step-around-scaler",
        """\
optimizer.zero_grad()
second.zero_grad()
with half():
    loss = criterion(model(inputs), labels) + critic(inputs).square().mean()
scaler.scale(loss).backward()
scaler.step(optimizer)
second.step()  # here
scaler.update()
""",
    ),
    "second loss not scaled": (
        "loss-not-scaled",
        """\
optimizer.zero_grad()
second.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
    more = critic(inputs).square().mean()
scaler.scale(loss).backward()
more.backward()  # here
scaler.step(optimizer)
scaler.step(second)
scaler.update()
""",
    ),
    "two scalers": (
        "loss-not-scaled",
        """\
optimizer.zero_grad()
second.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
    more = critic(inputs).square().mean()
scaler.scale(loss).backward()
scaler.scale(more).backward()
scaler.step(optimizer)
scaler.update()
other_scaler.step(second)  # here
other_scaler.update()
""",
    ),
    "update in the middle": (
        "update-too-early",
        """\
optimizer.zero_grad()
second.zero_grad()
with half():
    loss = criterion(model(inputs), labels) + critic(inputs).square().mean()
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.update()  # here
scaler.step(second)
""",
    ),
    "update each micro-batch": (
        "update-too-early",
        """\
optimizer.zero_grad()
for part in inputs.split(4):
    with half():
        loss = model(part).float().square().mean() / 2
    scaler.scale(loss).backward()
    scaler.update()  # here
scaler.step(optimizer)
""",
    ),
    "unscale each micro-batch": (
        "unscaled-twice",
        """\
optimizer.zero_grad()
for part in inputs.split(4):
    with half():
        loss = model(part).float().square().mean() / 2
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # here
nn.utils.clip_grad_norm_(model.parameters(), 1.0)
scaler.step(optimizer)
scaler.update()
""",
    ),
    "unscale first of two": (
        "backward-after-unscale",
        """\
optimizer.zero_grad()
first, last = inputs.split(4)
with half():
    loss = model(first).float().square().mean() / 2
scaler.scale(loss).backward()
scaler.unscale_(optimizer)
with half():
    loss = model(last).float().square().mean() / 2
scaler.scale(loss).backward()  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "clip scaled": (
        "clip-before-unscale",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "clip wrong optimizer": (
        "clip-before-unscale",
        """\
optimizer.zero_grad()
second.zero_grad()
with half():
    loss = criterion(model(inputs), labels) + critic(inputs).square().mean()
scaler.scale(loss).backward()
scaler.unscale_(optimizer)
nn.utils.clip_grad_norm_(model.parameters(), 1.0)
nn.utils.clip_grad_norm_(critic.parameters(), 1.0)  # here
scaler.step(optimizer)
scaler.step(second)
scaler.update()
""",
    ),
    "clip by hand": (
        "scaled-gradients",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
for parameter in model.parameters():
    parameter.grad.data.clamp_(-0.1, 0.1)  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "noise": (
        "scaled-gradients",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
for parameter in model.parameters():
    parameter.grad += 1e-3 * torch.randn_like(parameter)  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "norm by hand": (
        "scaled-gradients",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
total = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
for parameter in model.parameters():
    parameter.grad.mul_((1.0 / (total + 1e-6)).clamp(max=1.0))  # here
scaler.step(optimizer)
scaler.update()
""",
    ),
    "penalty": (
        "scaled-gradients",
        """\
second.zero_grad()
real = inputs.clone().requires_grad_()
with half():
    judged = critic(real).sum()
(slope,) = torch.autograd.grad(scaler.scale(judged), real, create_graph=True)
penalty = (slope.norm(dim=1) - 1).square().mean()  # here
scaler.scale(penalty).backward()
scaler.step(second)
scaler.update()
""",
    ),
    "no update": (
        "scaler-not-updated",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
scaler.step(optimizer)  # here
""",
    ),
    "stepped twice": (
        "unscaled-twice",
        """\
optimizer.zero_grad()
with half():
    loss = criterion(model(inputs), labels)
scaler.scale(loss).backward()
scaler.step(optimizer)
scaler.step(optimizer)  # here
scaler.update()
""",
    ),
}
