import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.security.KeyPair;
import java.security.KeyPairGenerator;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.Provider;
import java.security.PublicKey;
import java.security.Security;
import java.security.Signature;
import java.util.Arrays;
import java.util.Collections;
import java.util.HexFormat;
import java.util.StringJoiner;
import java.util.TreeSet;
import javax.crypto.Cipher;
import javax.crypto.KeyGenerator;
import javax.crypto.SecretKey;
import javax.crypto.spec.IvParameterSpec;

/** Signs with SunPKCS11: for each line it reads, one signature of each key of the token, in hexadecimal. */
public class Signer {
    private static byte[] data;
    private static Provider provider;

    private static byte[] signAndVerify(PrivateKey key, PublicKey publicKey) throws Exception {
        String algorithm = key.getAlgorithm().equals("EC") ? "SHA256withECDSA" : "SHA256withRSA";
        Signature signer = Signature.getInstance(algorithm, provider);
        signer.initSign(key);
        signer.update(data);
        byte[] signature = signer.sign();
        Signature verifier = Signature.getInstance(algorithm, provider);
        verifier.initVerify(publicKey);
        verifier.update(data);
        if (!verifier.verify(signature)) throw new IllegalStateException(algorithm + " does not verify");
        return signature;
    }

    /** Keys that live as long as their session: a key pair that signs, a key that encrypts. */
    private static void useSessionKeys() throws Exception {
        KeyPairGenerator pairs = KeyPairGenerator.getInstance("EC", provider);
        pairs.initialize(256);
        KeyPair pair = pairs.generateKeyPair();
        signAndVerify(pair.getPrivate(), pair.getPublic());
        KeyGenerator generator = KeyGenerator.getInstance("AES", provider);
        generator.init(256);
        SecretKey key = generator.generateKey();
        Cipher cipher = Cipher.getInstance("AES/CBC/PKCS5Padding", provider);
        cipher.init(Cipher.ENCRYPT_MODE, key);
        byte[] sealed = cipher.doFinal(data);
        Cipher opener = Cipher.getInstance("AES/CBC/PKCS5Padding", provider);
        opener.init(Cipher.DECRYPT_MODE, key, new IvParameterSpec(cipher.getIV()));
        if (!Arrays.equals(opener.doFinal(sealed), data)) throw new IllegalStateException("AES differs");
    }

    public static void main(String[] arguments) throws Exception {
        provider = Security.getProvider("SunPKCS11").configure(arguments[0]);
        Security.addProvider(provider);
        data = arguments[2].getBytes(StandardCharsets.UTF_8);
        KeyStore store = KeyStore.getInstance("PKCS11", provider);
        store.load(null, arguments[1].toCharArray());
        TreeSet<String> labels = new TreeSet<>(Collections.list(store.aliases()));
        System.out.println(String.join(" ", labels));
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = input.readLine(); line != null; line = input.readLine()) {
            StringJoiner words = new StringJoiner(" ");
            for (String label : labels) {
                PrivateKey key = (PrivateKey) store.getKey(label, null);
                byte[] signature = signAndVerify(key, store.getCertificate(label).getPublicKey());
                words.add(label + "=" + HexFormat.of().formatHex(signature));
            }
            if (line.equals("session keys")) useSessionKeys();
            System.out.println(words);
        }
    }
}
