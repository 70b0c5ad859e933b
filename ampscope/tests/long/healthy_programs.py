"""More healthy programs, of the form of healthy_models.py."""

from healthy_models import FIRST

HEALTHY = FIRST | {
    "mixture of experts": (
        "bfloat16",
        """
class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(32, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(4))
    def forward(self, x):
        weight, chosen = self.gate(x).float().softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            share = (weight * (chosen == index)).sum(-1, keepdim=True)
            out = out + share.to(x.dtype) * expert(x)
        return out
model = nn.Sequential(nn.Linear(16, 32), Experts(), nn.Linear(32, 8))
inputs, labels = torch.randn(16, 16), torch.randint(0, 8, (16,))
def compute():
    return functional.cross_entropy(model(inputs), labels)
""",
    ),
    "checkpointing": (
        "bfloat16",
        """
from torch.utils.checkpoint import checkpoint
class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.1)) for _ in range(3))
        self.head = nn.Linear(32, 8)
    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)
model = Deep()
inputs, labels = torch.randn(8, 32), torch.randint(0, 8, (8,))
def compute():
    return functional.cross_entropy(model(inputs), labels)
""",
    ),
    "accumulation float16": (
        "",
        """
model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 8))
inputs, labels = torch.randn(32, 16), torch.randint(0, 8, (32,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=20)
for step in range(30):
    part = slice(8 * (step % 4), 8 * (step % 4) + 8)
    with torch.autocast("cpu", torch.float16):
        loss = functional.cross_entropy(model(inputs[part]), labels[part]) / 4
    scaler.scale(loss).backward()
    if step % 4 == 3:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
""",
    ),
    "lora": (
        "",
        """
class Lora(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.down = nn.Linear(inner.in_features, 4, bias=False)
        self.up = nn.Linear(4, inner.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))
model = nn.Sequential(Lora(nn.Linear(16, 32)), nn.ReLU(), Lora(nn.Linear(32, 8)))
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
def compute():
    return functional.cross_entropy(model(inputs), labels)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
""",
    ),
    "frozen backbone": (
        "",
        """
class Tuned(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2))
        self.backbone.requires_grad_(False)
        self.head = nn.Linear(32, 8)
    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self
    def forward(self, x):
        with torch.no_grad():
            x = self.backbone(x)
        return self.head(x)
model = Tuned().train()
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
def compute():
    return functional.cross_entropy(model(inputs), labels)
optimizer = torch.optim.AdamW(model.head.parameters(), lr=1e-4)

for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
""",
    ),
    "graph network": (
        "bfloat16",
        """
class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.message, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 4)
    def forward(self, x, edges):
        x = self.first(x).relu()
        sent = self.message(x[edges[0]])
        x = torch.zeros_like(x).index_add(0, edges[1], sent.to(x.dtype))
        return self.last(x.relu())
model = Graph()
nodes, edges, labels = torch.randn(20, 8), torch.randint(0, 20, (2, 60)), torch.randint(0, 4, (20,))
def compute():
    return functional.cross_entropy(model(nodes, edges), labels)
""",
    ),
    "nerf": (
        "bfloat16",
        """
model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 4))
points, colours = torch.randn(8, 16, 4), torch.rand(8, 3)
def compute():
    coded = torch.cat([f(points * 2**k) for k in range(3) for f in (torch.sin, torch.cos)], -1)
    out = model(coded)
    density, colour = functional.softplus(out[..., 0].float()), out[..., 1:].float().sigmoid()
    alpha = 1 - torch.exp(-density * 0.1)
    through = torch.cumprod(torch.cat([torch.ones(8, 1), 1 - alpha + 1e-10], -1), -1)[:, :-1]
    return functional.mse_loss(((alpha * through)[..., None] * colour).sum(1), colours)
""",
    ),
    "flow": (
        "bfloat16",
        """
class Coupling(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
    def forward(self, x):
        a, b = x.chunk(2, -1)
        log_scale, shift = self.net(a).float().chunk(2, -1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([a, b * log_scale.exp() + shift], -1), log_scale.sum(-1)
model = Coupling()
inputs = torch.randn(16, 16)
def compute():
    z, determinant = model(inputs)
    return (0.5 * z.square().sum(-1) - determinant).mean()
""",
    ),
    "lbfgs": (
        "",
        """
model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
def closure():
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.mse_loss(model(inputs).float(), targets)
    loss.backward()
    return loss
for update in range(6):
    optimizer.step(closure)
""",
    ),
    "sam": (
        "",
        """
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

def compute():
    with torch.autocast("cpu", torch.bfloat16):
        return functional.cross_entropy(model(inputs), labels)
for update in range(6):
    compute().backward()
    with torch.no_grad():
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm() + 1e-12
        moves = [p.grad * (0.05 / norm) for p in model.parameters()]
        for p, move in zip(model.parameters(), moves):
            p.add_(move)
    optimizer.zero_grad()
    compute().backward()
    with torch.no_grad():
        for p, move in zip(model.parameters(), moves):
            p.sub_(move)
    optimizer.step()
    optimizer.zero_grad()
""",
    ),
    "loss outside in float32": (
        "",
        """
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    loss = functional.cross_entropy(outputs.float(), labels)
    right = (outputs.detach().softmax(-1).argmax(-1) == labels).sum()
    loss.backward()
    optimizer.step()
""",
    ),
    "metrics outside": (
        "",
        """
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(inputs)
    loss = functional.cross_entropy(outputs.float(), labels)
    right = (outputs.detach().softmax(-1).argmax(-1) == labels).sum()
    entropy = -(outputs.softmax(-1) * outputs.log_softmax(-1)).sum(-1).mean()
    loss.backward()
    optimizer.step()
""",
    ),
    "validation between": (
        "",
        """
model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 8))
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for update in range(6):
    model.train()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(model(inputs), labels)
    loss.backward()
    optimizer.step()
    model.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        model(inputs).argmax(-1)
""",
    ),
    "detection": (
        "bfloat16",
        """
import torchvision
options = {"weights": None, "weights_backbone": None, "num_classes": 3, "min_size": 64, "max_size": 64}
model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(**options)
images = [torch.rand(3, 64, 64) for _ in range(2)]
targets = [{"boxes": torch.tensor([[4.0, 4.0, 40.0, 40.0]]), "labels": torch.tensor([1])} for _ in range(2)]
def compute():
    return sum(model(images, targets).values())
""",
    ),
    "segmentation torchvision": (
        "bfloat16",
        """
import torchvision
model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
images, masks = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
def compute():
    return functional.cross_entropy(model(images)["out"], masks)
""",
    ),
    "optical flow": (
        "bfloat16",
        """
import torchvision
model = torchvision.models.optical_flow.raft_small(weights=None)
left, right, flow = torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), torch.zeros(1, 2, 128, 128)
def compute():
    return sum((part.float() - flow).abs().mean() for part in model(left, right, num_flow_updates=2))
""",
    ),
    "timm mixup": (
        "",
        """
import timm
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.utils import NativeScaler, ModelEmaV3
model = timm.create_model("test_vit", num_classes=8, img_size=64, drop_path_rate=0.1)
mix = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=8)
images, labels = torch.randn(4, 3, 64, 64), torch.randint(0, 8, (4,))
criterion = SoftTargetCrossEntropy()
ema = ModelEmaV3(model)
scaler = NativeScaler(device="cpu")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for update in range(6):
    inputs, targets = mix(images.clone(), labels)
    with torch.autocast("cpu", torch.float16):
        loss = criterion(model(inputs), targets)
    optimizer.zero_grad()
    scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
    ema.update(model)
""",
    ),
    "a cast that is needed": (
        "bfloat16",
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 8)
    def forward(self, x):
        x = self.first(x).relu().float()
        return self.last(x) / (1 + x.var(-1, keepdim=True))
model = Model()
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
def compute():
    return functional.cross_entropy(model(inputs), labels)
""",
    ),
    "a cast of a few values": (
        "bfloat16",
        """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last, self.gate = nn.Linear(16, 256), nn.Linear(256, 8), nn.Linear(8, 1)
    def forward(self, x):
        x = self.first(x).relu()
        return self.last(x) * self.gate(x[:2, :8].float()).mean()
model = Model()
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
def compute():
    return functional.cross_entropy(model(inputs), labels)
""",
    ),
}
