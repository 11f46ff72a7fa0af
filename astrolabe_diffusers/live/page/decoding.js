// Bytes to pictures. H.264 needs WebCodecs, which browsers have in secure contexts only: https and loopback.

const H264 = "avc1.42E01F";

/** The codecs that this browser decodes, best first. */
export async function decodableCodecs() {
  const images = ["jpeg", "webp"];
  if (!globalThis.isSecureContext || !globalThis.VideoDecoder) return images;
  const { supported } = await VideoDecoder.isConfigSupported({ codec: H264 });
  return supported ? ["h264", ...images] : images;
}

/**
 * Decodes the pictures of one lane. `receiver` has `picture(frame, bitmap)`, in any order within a block, and
 * `lost(frame, error)`: each frame comes to one of the two. Its `decode` takes the picture of a frame, and whether a block
 * begins or ends with it.
 */
export function newDecoder({ codec, codec_string: codecString }, receiver) {
  return codec === "h264" ? new VideoPictures(codecString ?? H264, receiver) : new ImagePictures(codec, receiver);
}

class ImagePictures {
  #codec;
  #receiver;

  constructor(codec, receiver) {
    this.#codec = codec;
    this.#receiver = receiver;
  }

  decode(frame, data) {
    const image = new Blob([data], { type: `image/${this.#codec}` });
    createImageBitmap(image).then(
      (bitmap) => this.#receiver.picture(frame, bitmap),
      (error) => this.#receiver.lost(frame, error),
    );
  }

  close() {}
}

class VideoPictures {
  #codec;
  #receiver;
  #decoder = null;
  #awaited = new Set(); // frames that the decoder has and has not given back

  constructor(codec, receiver) {
    this.#codec = codec;
    this.#receiver = receiver;
  }

  decode(frame, data, { begins, ends }) {
    // Browsers close the decoder of a tab that is hidden for long. A new one can begin with any block.
    const closed = this.#decoder === null || this.#decoder.state === "closed";
    if (closed && begins) this.#open();
    this.#awaited.add(frame);
    if (closed && !begins) {
      this.#lose(new Error("the decoder was closed"));
      return;
    }
    try {
      this.#decoder.decode(new EncodedVideoChunk({ type: begins ? "key" : "delta", data, timestamp: frame }));
    } catch (error) {
      // It would wait for a key frame, which the next block begins with.
      this.close();
      this.#lose(error);
      return;
    }
    // The last pictures of a block are not kept back for the next, which begins with a key frame.
    if (ends) this.#decoder.flush().catch(() => {});
  }

  #open() {
    this.#lose(new Error("the decoder was closed"));
    this.#decoder = new VideoDecoder({
      output: (picture) => {
        const frame = picture.timestamp;
        this.#awaited.delete(frame);
        // A decoder has few pictures to lend and stops when they are out: each is copied and given back at once.
        createImageBitmap(picture).then(
          (bitmap) => this.#receiver.picture(frame, bitmap),
          (error) => this.#receiver.lost(frame, error),
        ).finally(() => picture.close());
      },
      error: (error) => this.#lose(error),
    });
    this.#decoder.configure({ codec: this.#codec, optimizeForLatency: true });
  }

  #lose(error) {
    const frames = [...this.#awaited];
    this.#awaited.clear();
    frames.forEach((frame) => this.#receiver.lost(frame, error));
  }

  close() {
    if (this.#decoder !== null && this.#decoder.state !== "closed") this.#decoder.close();
  }
}
