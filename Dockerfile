# For CPUs:         docker build -t amp-train .
# For NVIDIA GPUs:  docker build -t amp-train --build-arg INDEX=https://pypi.org/simple .
FROM python:3.11-slim
ARG INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /amp-train
COPY requirements.txt .
RUN pip install --no-cache-dir torch torchvision --index-url $INDEX && pip install --no-cache-dir -r requirements.txt
COPY . .
WORKDIR /work
ENTRYPOINT ["python", "/amp-train/main.py"]
CMD ["compare", "--demo"]
