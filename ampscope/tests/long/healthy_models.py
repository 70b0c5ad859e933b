"""Healthy programs without their head and, if a type is named, without their loop: nothing is to be said of them."""

FIRST = {
    "vae": (
        "float16",
        """
class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.decoder(z), mean, log_variance
model = VAE()
data = torch.rand(16, 64)
def compute():
    logits, mean, log_variance = model(data)
    divergence = -0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum(-1).mean()
    return functional.binary_cross_entropy_with_logits(logits, data, reduction="none").sum(-1).mean() + divergence
""",
    ),
    "gan": (
        "",
        """
generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
critic = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
first = torch.optim.Adam(generator.parameters(), 1e-4)
second = torch.optim.Adam(critic.parameters(), 1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
criterion = nn.BCEWithLogitsLoss()
for update in range(8):
    real, noise = torch.randn(16, 16), torch.randn(16, 8)
    with torch.autocast("cpu", torch.float16):
        fake = generator(noise)
        judged = criterion(critic(real), torch.ones(16, 1)) + criterion(critic(fake.detach()), torch.zeros(16, 1))
    second.zero_grad()
    scaler.scale(judged).backward()
    scaler.step(second)
    with torch.autocast("cpu", torch.float16):
        loss = criterion(critic(fake), torch.ones(16, 1))
    first.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(first)
    scaler.update()
""",
    ),
    "gan two scalers": (
        "",
        """
generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
critic = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
first = torch.optim.Adam(generator.parameters(), 1e-4)
second = torch.optim.Adam(critic.parameters(), 1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
scaler_2 = torch.amp.GradScaler('cpu', init_scale=128.0)
criterion = nn.BCEWithLogitsLoss()
for update in range(8):
    real, noise = torch.randn(16, 16), torch.randn(16, 8)
    with torch.autocast("cpu", torch.float16):
        fake = generator(noise)
        judged = criterion(critic(real), torch.ones(16, 1)) + criterion(critic(fake.detach()), torch.zeros(16, 1))
    second.zero_grad()
    scaler_2.scale(judged).backward()
    scaler_2.step(second)
    scaler_2.update()
    with torch.autocast("cpu", torch.float16):
        loss = criterion(critic(fake), torch.ones(16, 1))
    first.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(first)
    scaler.update()
""",
    ),
    "wgan-gp": (
        "",
        """
generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16))
critic = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
first = torch.optim.Adam(generator.parameters(), 1e-4)
second = torch.optim.Adam(critic.parameters(), 1e-4)
scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
for update in range(8):
    real, noise = torch.randn(16, 16), torch.randn(16, 8)
    second.zero_grad()
    with torch.autocast("cpu", torch.float16):
        fake = generator(noise).detach().float()
        loss = critic(fake).mean() - critic(real).mean()
        mix = torch.rand(16, 1)
        between = (mix * real + (1 - mix) * fake).requires_grad_()
        judged = critic(between).sum()
    (slope,) = torch.autograd.grad(scaler.scale(judged), between, create_graph=True)
    slope = slope / scaler.get_scale()
    with torch.autocast("cpu", torch.float16):
        loss = loss + 10 * (slope.norm(2, dim=1) - 1).square().mean()
    scaler.scale(loss).backward()
    scaler.step(second)
    first.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = -critic(generator(noise)).mean()
    scaler.scale(loss).backward()
    scaler.step(first)
    scaler.update()
""",
    ),
    "diffusion": (
        "",
        """
class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.last = nn.Conv2d(16, 3, 3, padding=1)
    def forward(self, x, t):
        angles = t[:, None].float() * torch.exp(-math.log(1e4) * torch.arange(8) / 8)
        time = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        return self.last(functional.silu(self.norm(self.first(x)) + time[:, :, None, None]))
model = Denoiser()
alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100), 0)
images = torch.randn(4, 3, 8, 8)
def compute():
    t = torch.randint(0, 100, (4,))
    noise = torch.randn_like(images)
    a = alphas[t][:, None, None, None]
    return functional.mse_loss(model(a.sqrt() * images + (1 - a).sqrt() * noise, t), noise)
ema = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

for update in range(6):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = compute()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        for average, value in zip(ema.parameters(), model.parameters()):
            average.lerp_(value, 0.01)
""",
    ),
    "lstm language model": (
        "bfloat16",
        """
class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.lstm = nn.LSTM(32, 32, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(32, 64)
    def forward(self, ids):
        return self.head(self.lstm(self.embed(ids))[0])
model = Language()
ids = torch.randint(0, 64, (4, 12))
def compute():
    return functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
""",
    ),
    "contrastive": (
        "bfloat16",
        """
model = nn.ModuleDict({"image": nn.Linear(32, 16), "text": nn.Linear(24, 16)})
model.register_parameter("temperature", nn.Parameter(torch.tensor(math.log(1 / 0.07))))
images, texts = torch.randn(8, 32), torch.randn(8, 24)
def compute():
    left = functional.normalize(model["image"](images), dim=-1)
    right = functional.normalize(model["text"](texts), dim=-1)
    logits = model.temperature.exp() * left @ right.t()
    labels = torch.arange(8)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.t(), labels)) / 2
""",
    ),
    "distillation": (
        "bfloat16",
        """
teacher = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 8))
inputs, labels = torch.randn(8, 16), torch.randint(0, 8, (8,))
def compute():
    with torch.no_grad():
        target = teacher(inputs)
    outputs = model(inputs)
    pair = (outputs / 2).log_softmax(-1), (target / 2).log_softmax(-1)
    soft = functional.kl_div(*pair, log_target=True, reduction="batchmean")
    return 4 * soft + functional.cross_entropy(outputs, labels)
""",
    ),
    "dqn": (
        "bfloat16",
        """
model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
target = copy.deepcopy(model).requires_grad_(False)
def compute():
    state, following = torch.randn(16, 4), torch.randn(16, 4)
    action, reward = torch.randint(0, 2, (16, 1)), torch.randn(16)
    with torch.no_grad():
        wanted = reward + 0.99 * target(following).amax(-1)
    return functional.smooth_l1_loss(model(state).gather(1, action)[:, 0].float(), wanted.float())
""",
    ),
    "policy gradient": (
        "bfloat16",
        """
model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))
def compute():
    distribution = torch.distributions.Categorical(logits=model(torch.randn(16, 4)))
    action = distribution.sample()
    return -(distribution.log_prob(action) * torch.randn(16)).mean() - 0.01 * distribution.entropy().mean()
""",
    ),
    "segmentation unet": (
        "float16",
        """
class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.inner = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Conv2d(16, 1, 1)
    def forward(self, x):
        a = self.down(x)
        return self.last(torch.cat([a, self.up(self.inner(a))], 1))
model = UNet()
images = torch.randn(2, 3, 16, 16)
masks = (torch.rand(2, 1, 16, 16) > 0.5).float()
def compute():
    logits = model(images)
    probability = logits.sigmoid().float()
    dice = 1 - (2 * (probability * masks).sum() + 1) / (probability.sum() + masks.sum() + 1)
    return dice + functional.binary_cross_entropy_with_logits(logits, masks)
""",
    ),
    "ctc speech": (
        "bfloat16",
        """
class Speech(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 32, 3, padding=1)
        self.gru = nn.GRU(32, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 12)
    def forward(self, x):
        return self.head(self.gru(self.conv(x).relu().transpose(1, 2))[0])
model = Speech()
sound = torch.randn(4, 16, 20)
targets = torch.randint(1, 12, (4, 6))
def compute():
    log = model(sound).float().log_softmax(-1).transpose(0, 1)
    return functional.ctc_loss(log, targets, torch.full((4,), 20), torch.full((4,), 6))
""",
    ),
    "rope transformer": (
        "bfloat16",
        """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        angles = torch.outer(torch.arange(16.0), 1e4 ** (-torch.arange(0, 8, 2) / 8))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
    def turn(self, x):
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], -1).type_as(x)
    def forward(self, x):
        q, k, v = self.qkv(x).view(2, 16, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))
class Norm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.more = Norm(32), Norm(32)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32))
    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(self.more(x))
model = nn.Sequential(nn.Embedding(64, 32), Block(), Block(), Norm(32), nn.Linear(32, 64))
ids = torch.randint(0, 64, (2, 17))
def compute():
    return functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
""",
    ),
}
